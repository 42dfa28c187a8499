import subprocess

import pytest

from datamodules.writing import build, parts
from datamodules.writing.build import WriterSettings
from longtake.errors import ConfigError, DataError
from tests.datamodules.synthetic import Squares
from tests.datamodules.writing.build_helpers import (
    BUILD,
    SMALL,
    _OneProcessPool,
    beside,
    content,
    ensure,
    keys,
    make,
    run_python,
)


def test_two_processes_at_once_build_once(tmp_path):
    trace = tmp_path / "trace"
    trace.mkdir()
    processes = [run_python(BUILD, tmp_path / "set", trace, 0.02, stderr=subprocess.PIPE) for _ in range(3)]
    logs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], logs
    assert sum("first use" in log for log in logs) == 1
    started = [path.name.split("-")[0] for path in trace.iterdir()]
    assert sorted(started) == [f"t{n}" for n in range(8)]
    assert beside(tmp_path / "set") == ["set", "trace"]


def test_ensure_builds_once_and_reuses(tmp_path, monkeypatch):
    first = ensure(tmp_path / "set")
    monkeypatch.setattr(build, "_build", None)
    assert ensure(tmp_path / "set") == first


def test_ensure_refuses_other_settings_by_name(tmp_path):
    ensure(tmp_path / "set")
    before = content(tmp_path / "set")
    with pytest.raises(ConfigError) as caught:
        ensure(tmp_path / "set", num_tasks=2, version=3, key="data.doom")
    text = str(caught.value)
    assert "scene.num_tasks (there: 1, wanted: 2), source_version (there: 1, wanted: 3)" in text
    assert "data.doom.root" in text
    assert "data.doom.rebuild=true" in text
    assert "seed" not in text
    assert content(tmp_path / "set") == before
    with pytest.raises(ConfigError, match=r"encode\.crf \(there: 16, wanted: 20\)"):
        ensure(tmp_path / "set", settings=WriterSettings(encode=build.EncodeSettings(crf=20)))


def test_ensure_rebuilds_other_settings_when_told(tmp_path, monkeypatch):
    ensure(tmp_path / "set")
    second = ensure(tmp_path / "set", num_tasks=2, rebuild=True)
    assert len(keys(second, "train")) == 6
    monkeypatch.setattr(build, "_build", None)
    assert ensure(tmp_path / "set", num_tasks=2, rebuild=True) == second


def test_ensure_says_what_is_wrong_with_a_damaged_set(tmp_path):
    ensure(tmp_path / "set")
    (tmp_path / "set" / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json cannot be read"):
        ensure(tmp_path / "set")


def test_a_stopped_build_of_other_settings_is_discarded(tmp_path, caplog):
    caplog.set_level("INFO", "longtake")
    (tmp_path / "set.partial" / "parts").mkdir(parents=True)
    (tmp_path / "set.partial" / "build.json").write_text("{}")
    (tmp_path / "set.partial" / "parts" / "000000.rows").write_text("")
    (tmp_path / "set.partial" / "parts" / "000000.data").write_text("")
    assert len(keys(ensure(tmp_path / "set"), "train")) == 3
    assert "begun with other settings" in caplog.text


@pytest.mark.parametrize(
    ("name", "is_cut"),
    [
        ("train-000000.tar", True),
        ("train-000001.index.jsonl", True),
        ("parts/000002.data", True),
        ("parts/000002.data", False),
        ("parts/000000.rows", False),
    ],
)
def test_a_tampered_partial_is_not_continued_blindly(name, is_cut, tmp_path, monkeypatch):
    source, root = Squares(num_tasks=3, splits=("train",)), tmp_path / "set"
    monkeypatch.setattr(build, "WorkerPool", _OneProcessPool)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("datamodules.writing.parts.Packer.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            make(source, root, 1)
    path = tmp_path / "set.partial" / name
    if name.endswith(".jsonl"):
        path.unlink()
    elif name.endswith(".rows"):
        path.write_text(path.read_text().replace("s000-1", "s000-9"))
    else:
        damaged = bytearray(path.read_bytes())
        if is_cut:
            del damaged[-1000:]
        else:
            damaged[-500] ^= 1  # in the last sample, which is in no shard yet
        path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"changed by someone else.*Delete .*set\.partial"):
        make(source, root, 1)
    assert not root.exists()


def test_parts_go_as_soon_as_their_samples_are_in_shards(tmp_path):
    source = Squares(num_tasks=5, splits=("train",))
    for name in ("parts", "records"):
        (tmp_path / name).mkdir()
    context = parts.PartContext(source, source.info(), SMALL.encode, tmp_path / "parts")
    packer = parts.Packer(tmp_path, max_samples=4, max_bytes=2**20)
    left = []
    for number, task in enumerate(source.tasks()):
        parts.write_part(context, (number, task), lambda note: None)
        packer.add_part(number, task)
        left.append(sorted(path.name for path in (tmp_path / "parts").glob("*.data")))
    packer.close()
    names = [f"00000{number}.data" for number in range(5)]
    # Shards of 4 samples from parts of 3: a shard is written when the first sample of the next one is seen.
    assert left == [names[:1], names[1:2], names[2:3], names[2:4], names[4:]]


def test_memory_does_not_grow_with_the_set(tmp_path):
    """30 MB of samples pass through; neither the writer nor a worker ever holds a fifth of that."""
    code = """
        import resource, sys
        from pathlib import Path
        from datamodules.writing import parts
        from datamodules.writing.build import build_dataset, WriterSettings
        from tests.datamodules.synthetic import Squares

        def peak(who):
            return resource.getrusage(who).ru_maxrss * 1024

        for name, num_tasks in (("small", 1), ("large", 30)):
            source = Squares(num_tasks=num_tasks, per_task=1, splits=("train",), ballast=1_000_000)
            build_dataset(source, Path(sys.argv[1], name), request={"n": num_tasks}, num_workers=1,
                          progress=False, settings=WriterSettings(max_samples_per_shard=64))
            print(peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN))
    """
    process = run_python(code, tmp_path, stdout=subprocess.PIPE)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    small, large = (list(map(int, line.split())) for line in output.splitlines())
    assert (tmp_path / "large" / "train-000000.tar").stat().st_size > 30_000_000
    assert large[0] - small[0] < 5_000_000
    assert large[1] - small[1] < 5_000_000


def test_the_number_of_workers_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="num_workers"):
        make(Squares(), tmp_path / "set", 0)


@pytest.mark.parametrize("name", ["max_samples_per_shard", "max_bytes_per_shard", "task_timeout_s"])
@pytest.mark.parametrize("value", [0, -1, "many"])
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ConfigError, match=f"writer.{name}"):
        WriterSettings(**{name: value})
