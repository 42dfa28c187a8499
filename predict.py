"""Makes videos with trained weights: load -> roll out -> write videos and figures.

python predict.py ckpt=<run folder | weights.safetensors | .ckpt> num_frames=81      --help lists every key
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from launcher.entry import entry_point
from launcher.stored import use_stored
from longtake.errors import ConfigError, DataError

if TYPE_CHECKING:
    from longtake.generate import VideoModel
    from longtake.rollout_report import SampleReport

logger = logging.getLogger("longtake")

# torch is imported inside the functions: --help and a typing error should not wait for it.


def main(cfg: DictConfig) -> int:
    """Makes every video that the config asks for. Returns 1 if one failed and `keep_going` was set."""
    from launcher.predict_jobs import check_predict, output_folder, prepared
    from launcher.token_figures import score_tokens
    from longtake.generate_tokens import TokenModel

    check_predict(cfg)
    model = prepared(cfg)
    with output_folder(cfg) as folder:
        if cfg.only_eval and isinstance(model, TokenModel):
            score_tokens(cfg, model, folder)
            return 0
        reports: list[SampleReport] = []
        failures = 0
        for name, make in _wanted(cfg, model, folder):
            try:
                reports += make(len(reports) + failures)
            except (ConfigError, DataError) as error:
                if not cfg.keep_going:
                    raise
                failures += cfg.num_samples
                logger.error("%s failed: %s", name, error)
        if not reports:
            raise DataError("no video was made; every start failed (see above).")
        _finish(cfg, model, folder, reports, failures)
    return 1 if failures else 0


def _wanted(cfg: DictConfig, model: VideoModel, folder: Path) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """Yields the name of every start, and what makes its videos, numbered from the number that it gets."""
    from launcher.predict_jobs import jobs
    from launcher.view_jobs import view_jobs
    from launcher.window_job import make_views

    several = view_jobs(cfg, model)
    for name, ready in several or ():
        yield name, lambda number, ready=ready: make_views(cfg, model, ready(), folder, number)
    for job in jobs(cfg, model) if several is None else ():
        yield job.name, lambda number, job=job: _make(cfg, model, job, folder, number)


def _make(cfg: DictConfig, model: VideoModel, job: Any, folder: Path, number: int) -> list[SampleReport]:
    """Makes the videos of one start and returns their figures."""
    from fractions import Fraction

    from launcher.keyboard import watched
    from launcher.spec_videos import view_names
    from launcher.window_job import log_figures
    from longtake.media.view_files import ViewLayout
    from longtake.rollout_report import write_rollout
    from longtake.truth import truth_of

    generation = model.generate(
        num_frames=cfg.num_frames,
        start=job.start,
        num_context_frames=job.num_context_frames,
        prompt=job.prompt,
        negative_prompt=cfg.negative_prompt,
        actions=job.actions,
        seed=cfg.seed,
        num_samples=cfg.num_samples,
        name=job.name,
    )
    plan = generation.request.plan
    truth = None if job.truth is None else truth_of(job.truth, model.video_encoder, plan, model.device)
    folders = [folder / f"sample_{number + sample:03d}" for sample in range(cfg.num_samples)]
    fps = Fraction(str(cfg.fps)) if cfg.fps is not None else model.fps
    layout = ViewLayout.of_rig(view_names(model), model.spec.data.get("rig"))
    names = model.spec.action_names if cfg.overlay_actions else ()
    reports = write_rollout(
        watched(generation), folders, fps=fps, truth=truth, only_eval=cfg.only_eval, layout=layout, action_names=names
    )
    for report, place in zip(reports, folders, strict=True):
        log_figures(report, place, job.name)
    return reports


def _finish(cfg: DictConfig, model: VideoModel, folder: Path, reports: list[SampleReport], failures: int) -> None:
    """Writes what holds for the whole run: metrics.json and spec.json."""
    from launcher.predict_jobs import provenance
    from longtake.rollout_report import summary, write_json

    result = summary(reports, {**provenance(cfg, model), "failed": failures})
    write_json(folder / "metrics.json", result)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    write_json(folder / "spec.json", {"config": resolved, "weights": model.spec.to_dict()})
    lines = [f"  {name:<22} {value:.4g}" for name, value in result["metrics"].items()]
    logger.info("%d videos in %s\n%s", len(reports), folder, "\n".join(lines))


if __name__ == "__main__":
    entry_point(main, "predict", prepare=use_stored)
