"""The command that encodes a set once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.shards import DatasetInfo
from datamodules.writing.build import WriterSettings, build_dataset
from tests.first_stage import NoisyClips, random_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips") / "set"
    source = NoisyClips(num_frames=9)
    build_dataset(source, root, request={}, settings=WriterSettings(), num_workers=1, progress=False)
    return root


def cache_latents(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.cache_latents", "num_workers=1", "progress=false", *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


def test_it_writes_latents_and_words_and_says_so(clips: Path, tmp_path: Path) -> None:
    weights = f"encoder.video.weights={random_weights(tmp_path)}"
    done = cache_latents(f"input={clips}", f"output={tmp_path / 'made'}", weights, "start_stride=4", "num_frames=5")
    assert done.returncode == 0, done.stderr
    info = DatasetInfo.load(tmp_path / "made")
    assert info.source.latents is not None
    assert f"by encoder {info.source.latents['encoder_fingerprint']}" in done.stdout
    assert "text: 6 words" in done.stdout
    assert {name: split.num_samples for name, split in info.splits.items()} == {"train": 4, "val": 2}

    again = cache_latents(f"input={clips}", f"output={tmp_path / 'made'}", weights)
    assert again.returncode == 2
    assert "overwrite=true" in again.stderr


def test_what_cannot_be_is_one_message_and_exit_code_2(clips: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'made'}"
    for overrides, message in (
        ((f"input={clips}", "encoder.video.weights=nothing"), "no first stage 'nothing'"),
        ((f"input={clips}", "encoder/video=wan_vae", "encoder.video.path=/nowhere"), "encoder.video.path"),
    ):
        done = cache_latents(output, *overrides)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "made").exists()
