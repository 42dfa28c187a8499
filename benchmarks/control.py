"""Does control count? PSNR of held-out clips under their own control, under that of another clip, and under none.

Rolled out by windows with the same noise; compared clip by clip, so that what makes a clip hard cancels.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from benchmarks.report import write_result
from launcher.compose import compose
from launcher.held_out_views import CONTROL_FROM, held_out_jobs
from launcher.predict_jobs import check_predict, prepared
from launcher.stored import use_stored
from launcher.window_job import control_types, knows_views, roll_out_views
from longtake.errors import ConfigError
from longtake.generate_diffusion import DiffusionModel
from longtake.metrics.first_chunk import Table

_BY_VIEW = "psnr_db@"
_KEPT = ("psnr_db", "copy_last_psnr_db", "vae_ceiling_psnr_db")


def run(argv: list[str]) -> int:
    """Runs the benchmark. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks control", description=__doc__)
    parser.add_argument("--ckpt", required=True, help="a run folder, a .safetensors file or a .ckpt")
    parser.add_argument("--clips", type=int, default=16, help="of each split, at most")
    parser.add_argument("--frames", type=int, default=33, help="of each video, those given included")
    parser.add_argument("--splits", nargs="+", default=["val", "test"], help="of held-out clips")
    parser.add_argument("--given", type=int, default=1, choices=(0, 1, 5), help="frames that each view is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust", nargs="*", default=[], help="packages whose classes the weights may name")
    parser.add_argument("--set", nargs="*", default=[], help="keys of conf/predict.yaml: rollout.num_steps=20 ...")
    parser.add_argument("--output", type=Path, default=None, help="write the figures there as JSON")
    options = parser.parse_args(argv)
    overrides = [f"ckpt={options.ckpt}", f"trust=[{','.join(options.trust)}]", *options.set]
    overrides += [f"num_frames={options.frames}", f"num_clips={options.clips}", f"seed={options.seed}"]
    overrides += [f"num_conditional_frames={options.given}", "only_eval=true"]
    use_stored(overrides)
    cfg = compose("predict", overrides)
    check_predict(cfg)
    model = prepared(cfg)
    if not isinstance(model, DiffusionModel) or not knows_views(model) or not control_types(model):
        raise ConfigError(f"{options.ckpt} knows no control; expected weights with control. Change `--ckpt`.")
    figures = measure(cfg, model, options.splits)
    table = control_table(figures)
    print(
        f"{options.ckpt}: {', '.join(control_types(model))} as control, {len(figures['own'])} clips of "
        f"{', '.join(options.splits)}, {options.frames} frames of which {options.given} are given"
    )
    print(table.text())
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    write_result("control", {"settings": settings, "table": table.to_json(), "clips": figures}, options.output)
    return 0


def measure(cfg: DictConfig, model: DiffusionModel, splits: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the mean figures of every rollout, by whose control it followed and by clip.

    Args:
        cfg: of predict.py.
        model: weights with control.
        splits: of held-out clips.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for source in CONTROL_FROM:
        for split in splits:
            own = cfg.copy()
            own.control_from, own.split = source, split
            for name, ready in held_out_jobs(own, model):
                with tempfile.TemporaryDirectory() as folder:
                    (report,) = roll_out_views(model, ready(), [Path(folder)], only_eval=True)
                metrics = report.metrics()
                kept = {key: value for key, value in metrics.items() if key in _KEPT or key.startswith(_BY_VIEW)}
                first, last = report.per_chunk["psnr_db"][0], report.per_chunk["psnr_db"][-1]
                found.setdefault(source, {})[name] = {**kept, "first_window": first, "last_window": last}
    return found


def control_table(figures: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Returns the means and the paired differences, with 95 % bootstrap intervals over clips.

    Args:
        figures: as `measure` returns them.
    """
    table, clips = Table(), sorted(figures["own"])

    def column(source: str, name: str) -> np.ndarray:
        return np.array([figures[source][clip].get(name, np.nan) for clip in clips])

    table.add("psnr, copy of the last frame", "dB", column("own", "copy_last_psnr_db"))
    table.add("psnr, ceiling of the first stage", "dB", column("own", "vae_ceiling_psnr_db"))
    for source, what in (("own", "own control"), ("other", "another clip's"), ("none", "no control")):
        table.add(f"psnr, {what}", "dB", column(source, "psnr_db"))
    for source, what in (("other", "another clip's"), ("none", "none")):
        for name, where in (("psnr_db", ""), ("first_window", ", first window"), ("last_window", ", last window")):
            table.add(f"own - {what}{where}", "dB", column("own", name) - column(source, name))
    for name in figures["own"][clips[0]]:
        if name.startswith(_BY_VIEW):
            view = name.removeprefix(_BY_VIEW)
            table.add(f"own - none, {view}", "dB", column("own", name) - column("none", name))
    return table
