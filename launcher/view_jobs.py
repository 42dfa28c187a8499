"""Which starts of several views predict.py has: specs, folders and files, or held-out clips."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launcher.predict_jobs import OF_VIEWS
from launcher.window_job import WindowJob, knows_views
from longtake.errors import ConfigError

logger = logging.getLogger("longtake")
Ready = Iterator[tuple[str, Callable[[], WindowJob]]]


def view_jobs(cfg: DictConfig, model: Any) -> Ready | None:
    """Returns the name of every start of several views and what makes it ready; None where one view is wanted.

    Raises:
        ConfigError: keys for several views and weights of one; or what the starts themselves raise.
    """
    if cfg.spec is not None:
        from launcher.spec_jobs import spec_jobs

        return spec_jobs(cfg, model)
    knows = knows_views(model)
    has_prompts = cfg.prompt is not None or cfg.prompts_file is not None
    kind = cfg.input or ("nothing" if has_prompts else "held_out")
    if knows and kind == "held_out" and cfg.input_type is None and cfg.prompts_file is None:
        from launcher.held_out_views import held_out_jobs

        return held_out_jobs(cfg, model)
    is_folder = cfg.input_type is None and kind not in ("held_out", "nothing") and Path(kind).is_dir()
    if (cfg.n_views is not None and kind != "held_out") or (knows and is_folder):
        from launcher.file_jobs import file_job

        return iter([file_job(cfg, model)])
    for key in OF_VIEWS:
        if cfg[key] is not None:
            raise ConfigError(
                f"{key} is given, and there are no several views to start from: expected weights of several views, and "
                f"a spec, a folder of views, n_views or held-out clips. Leave out `{key}`."
            )
    if cfg.control_from != "own":
        raise ConfigError(
            f"control_from is {cfg.control_from}, and these weights know no control, or are not rolled out by windows. "
            "Leave out `control_from`."
        )
    if getattr(model.network, "control", None) is not None:
        logger.warning(
            "no control video is read: these weights know control, but %s. Set rollout=sliding_window, or give `spec`.",
            f"the rollout is {model.rollout.kind}" if not knows else "one view is started from what is given",
        )
    return None
