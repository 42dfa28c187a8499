"""The submission of the 1X challenge: written, checked, and every mistake found."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from longtake.errors import ConfigError, DataError
from longtake.metrics.onex_submission import FIELDS, check_submission, write_submission

GRID, K, VOCAB = (3, 2, 2), 5, 640
README = dict.fromkeys(FIELDS, "Somebody")


def sample(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(VOCAB)[:K] for _ in range(12)]).reshape(*GRID, K)
    return indices, rng.standard_normal((*GRID, K))


def write(path: Path, count: int = 3, **changes: np.ndarray) -> Path:
    samples = (
        (str(number), changes.get("indices", sample(number)[0]), changes.get("values", sample(number)[1]))
        for number in range(count)
    )
    assert write_submission(path, samples, README) == count
    return path


def problems(path: Path, count: int | None = 3) -> list[str]:
    return check_submission(path, num_samples=count, grid=GRID, vocab_size=VOCAB, k=K)


def test_round_trip(tmp_path):
    path = write(tmp_path / "new" / "submission.zip")
    assert problems(path) == []
    assert [file.name for file in path.parent.iterdir()] == ["submission.zip"]
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["README.txt", "0.npz", "1.npz", "2.npz"]
        arrays = np.load(io.BytesIO(archive.read("1.npz")))
        archive.extractall(tmp_path / "folder")
    assert (arrays["indices"].dtype, arrays["values"].dtype) == (np.int32, np.float32)
    assert np.array_equal(arrays["indices"], sample(1)[0])
    assert np.allclose(arrays["values"], sample(1)[1])
    assert problems(tmp_path / "folder") == []
    assert check_submission(path)[0] == "there are 3 samples; expected 450"


def bad_indices(value: int) -> np.ndarray:
    indices = sample(0)[0]
    indices[0, 0, 0, 1] = value
    return indices


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"indices": bad_indices(VOCAB)}, "indices run from"),
        ({"indices": bad_indices(-1)}, "indices run from -1"),
        ({"indices": np.zeros((*GRID, K))}, "given twice"),
        ({"indices": sample(0)[0][..., :4]}, "expected int32 [3, 2, 2, 5]"),
        ({"values": np.full((*GRID, K), np.nan)}, "NaN"),
        ({"values": np.zeros((*GRID, 4))}, "values are float32 [3, 2, 2, 4]"),
    ],
)
def test_bad_arrays(tmp_path, changes, words):
    found = problems(write(tmp_path / "submission.zip", 1, **changes), 1)
    assert len(found) == 1
    assert words in found[0]
    assert found[0].startswith("0.npz: ")


def test_bad_archives(tmp_path):
    path = tmp_path / "submission.zip"
    assert "cannot be read" in problems(path)[0]
    path.write_bytes(b"nothing")
    assert "cannot be read" in problems(path)[0]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.txt", "method: x\nteam:\n")
        archive.writestr("a/0.npz", b"PK")
        archive.writestr("notes.md", "x")
        archive.writestr("1.npz", bytes(10**6))
    found = "\n".join(problems(path, None))
    for words in ("a/0.npz lies in a folder", "notes.md does not belong", "not state team", "not state country"):
        assert words in found
    assert "1.npz: cannot be read (it has 1000000 bytes" in found
    assert "not state method" not in found


def test_pickled_arrays_are_refused(tmp_path):
    content = io.BytesIO()
    np.savez(content, indices=np.array([object()]), values=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("0.npz", content.getvalue())
    found = problems(tmp_path / "s.zip", 1)
    assert "README.txt is missing" in found
    assert any(line.startswith("0.npz: cannot be read") for line in found)


def test_refused(tmp_path):
    with pytest.raises(ConfigError, match="zip"):
        write_submission(tmp_path / "submission", [], README)
    with pytest.raises(ConfigError, match="submission_readme.team"):
        write_submission(tmp_path / "s.zip", [], {**README, "team": " "})
    for names in (["a", "a"], ["../a"]):
        with pytest.raises(DataError, match="different ids"):
            write_submission(tmp_path / "s.zip", ((name, *sample(0)) for name in names), README)
    assert list(tmp_path.iterdir()) == []
