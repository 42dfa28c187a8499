import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from datamodules.shards import DatasetInfo
from launcher import entry
from longtake.errors import ConfigError
from scripts.make_shards import hand_down, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def conf(tmp_path) -> Path:
    """A folder with one more source and a small geometry, as a user may have one."""
    for group in ("source", "video"):
        (tmp_path / "conf" / group).mkdir(parents=True)
    (tmp_path / "conf" / "source" / "squares.yaml").write_text(
        "_target_: tests.datamodules.synthetic.Squares\n_convert_: all\n"
        "num_tasks: ${num_clips}\nper_task: 2\nnum_frames: ${video.num_frames}\n"
        "views: [main]\ncontrol: []\nlicence: CC0\n"
        "faults: {1: raise, 4: skip}\n"
    )
    (tmp_path / "conf" / "video" / "tiny.yaml").write_text("fps: 35/3\nheight: 16\nwidth: 24\nnum_frames: 5\n")
    return tmp_path / "conf"


class Outcome(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capfd) -> Callable[..., Outcome]:
    """Runs the command in this process, which spares the start of an interpreter."""

    def run_here(*arguments: object, conf: Path | None = None) -> Outcome:
        options = [] if conf is None else ["--config-dir", str(conf), "video=tiny", "num_workers=1"]
        monkeypatch.setattr(sys, "argv", ["make_shards", *options, *map(str, arguments)])
        code = entry.run(main, "make_shards")
        return Outcome(code, *capfd.readouterr())

    return run_here


def assert_one_message(result: Outcome, code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    for word in words:
        assert word in result.stderr


def test_a_set_is_made_and_summed_up(run, conf, tmp_path):
    output = tmp_path / "set"
    result = run("source=squares", f"output={output}", "num_clips=6", conf=conf)
    assert result.returncode == 0, result.stderr
    info = DatasetInfo.load(output)
    assert {name: split.num_samples for name, split in info.splits.items()} == {"train": 7, "val": 4}
    assert info.request["source"]["num_tasks"] == 6
    assert info.request["source"]["_target_"] == "tests.datamodules.synthetic.Squares"
    for words in (
        "train        7 clips",
        "val          4 clips",
        "0.001 h",
        "skipped 2",
        "t1: KeyError",
        "clip 7: too dark",
    ):
        assert words in result.stdout
    assert len((output / "skipped.jsonl").read_text().splitlines()) == 2
    sheet = np.asarray(Image.open(output / "contact_sheet.png"))
    assert sheet.std() > 10
    assert str(output / "contact_sheet.png") in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf", "set"]

    again = run("source=squares", f"output={output}", "num_clips=2", conf=conf)
    assert_one_message(again, 2, "exists already", "overwrite=true")
    assert DatasetInfo.load(output) == info
    third = run("source=squares", f"output={output}", "num_clips=2", "overwrite=true", conf=conf)
    assert third.returncode == 0, third.stderr
    assert DatasetInfo.load(output).splits["train"].num_samples == 3


def test_mistakes_are_one_message(run, conf, tmp_path):
    assert_one_message(run(f"output={tmp_path / 'set'}"), 2, "`source` must be given")
    assert_one_message(run("source=squares", "num_clips=1", conf=conf), 2, "`output` must be given")
    assert_one_message(
        run(
            "source=squares",
            f"output={tmp_path / 'set'}",
            "num_clips=1",
            "writer.max_samples_per_shard=0",
            conf=conf,
        ),
        2,
        "writer.max_samples_per_shard",
    )
    assert_one_message(run("source=video_folder", f"output={tmp_path / 'set'}", conf=conf), 2, "input")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf"]


def test_num_clips_and_seed_reach_the_source_or_are_refused(tmp_path):
    cfg = OmegaConf.create({"num_clips": 7, "seed": 3, "source": {"num_clips": 512, "seed": 0}})
    hand_down(cfg)
    assert cfg.source == {"num_clips": 7, "seed": 3}
    with pytest.raises(ConfigError, match="num_clips is 7"):
        hand_down(OmegaConf.create({"num_clips": 7, "seed": 3, "source": {"input": "videos"}}))


def test_nothing_left_exits_with_1(run, conf, tmp_path):
    result = run("source=squares", f"output={tmp_path / 'set'}", "num_clips=1", "source.per_task=0", conf=conf)
    assert_one_message(result, 1, "nothing is left to write")
    unwritable = run("source=squares", "output=/proc/set", "num_clips=1", conf=conf)
    assert_one_message(unwritable, 1, "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_the_command_needs_an_output():
    command = [sys.executable, "-m", "scripts.make_shards", "source=video_folder", "input=videos"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)
    assert_one_message(Outcome(result.returncode, result.stdout, result.stderr), 2)
