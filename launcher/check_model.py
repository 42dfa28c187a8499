"""Rules of `check_config` about models that are trained by an objective and used by a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launcher.check_parts import complaints
from longtake.errors import ConfigError

_RATIO_TIME = 4  # of every video encoder there is; the module checks again with the one that was chosen


def diffusion(cfg: DictConfig) -> Iterator[str]:
    """Clips must fit the objective, and the rollout what the objective trains for."""
    is_model = all(key in cfg.module for key in ("objective", "rollout", "solver"))
    if not is_model or not isinstance(cfg.video.num_frames, int):
        return
    from longtake.geometry import pixel_frames
    from longtake.objectives.slot_objective import SlotObjective
    from longtake.rollout.sliding_plan import plan_of

    def check() -> None:
        node = _plain(cfg.module)
        objective, rollout, solver = (_built(node[name]) for name in ("objective", "rollout", "solver"))
        if not isinstance(objective, SlotObjective) or rollout.kind == "tokens":
            raise ConfigError(_mixed(objective, rollout, "ar_diffusion"))
        trained = objective.trained_for(num_frames_px=cfg.video.num_frames, ratio=_RATIO_TIME)
        _check_blocks(cfg, trained.own_starts)
        solver.begin(rollout.num_steps)
        context = node.get("num_context_frames")
        if context is None:
            context = pixel_frames(trained.chunk_lat, _RATIO_TIME) if rollout.kind == "memory" else 0
        plan_of(rollout, num_frames_px=context + 1, context_px=context, trained=trained)
        shown = OmegaConf.select(cfg, "callbacks.video_grid.num_frames")
        if isinstance(shown, int) and 1 <= shown <= context:
            raise ConfigError(
                f"callbacks.video_grid.num_frames is {shown}, and {context} frames are given at the start; expected "
                f"more than {context}, or null. Change `callbacks.video_grid.num_frames`."
            )

    yield from complaints(check)


def _check_blocks(cfg: DictConfig, own_starts: bool) -> None:
    """Cached clips must be made of blocks where, and only where, the objective takes blocks. Raises ConfigError."""
    wanted = cfg.video.get("block_frames") if own_starts else None
    if "block_frames" in cfg.data and cfg.data.block_frames != wanted:
        raise ConfigError(
            f"data.block_frames is {cfg.data.block_frames}, and the objective needs {wanted}; expected the same. "
            "Change `data` (data=doom_blocks_latents has blocks, data=doom_latents has none), `video` or `objective`."
        )


def tokens(cfg: DictConfig) -> Iterator[str]:
    """Clips must be longer than what is given, and the rollout one of tokens."""
    is_model = all(key in cfg.module for key in ("objective", "rollout")) and "solver" not in cfg.module
    if not is_model or not isinstance(cfg.video.num_frames, int):
        return
    from longtake.geometry import latent_frames
    from longtake.objectives.next_token import NextToken

    def check() -> None:
        node = _plain(cfg.module)
        objective, rollout = (_built(node[name]) for name in ("objective", "rollout"))
        if not isinstance(objective, NextToken) or rollout.kind != "tokens":
            raise ConfigError(_mixed(objective, rollout, "ar_tokens"))
        network, ratio = node["network"], node["ratio_time"]
        if "grid_lat" not in network:
            raise ConfigError(
                f"network is a {str(network.get('_target_')).rpartition('.')[2]}; module=ar_tokens trains a token "
                "network, for example token_small. Change `network`."
            )
        num_lat = latent_frames(cfg.video.num_frames, ratio, "video.num_frames")
        if network["grid_lat"][0] != num_lat:
            raise ConfigError(
                f"network.grid_lat is {list(network['grid_lat'])}; clips of {cfg.video.num_frames} frames have "
                f"{num_lat} latent frames. Change `network.grid_lat` or `video.num_frames`."
            )
        objective.check_start(bool(network.get("bov", False)))

    yield from complaints(check)


def _mixed(objective: object, rollout: object, module: str) -> str:
    kinds = f"objective is {type(objective).__name__} and rollout is {type(rollout).__name__}"
    wanted = "next_token and tokens" if module == "ar_tokens" else "teacher_forcing and memory"
    return (
        f"{kinds}, which module={module} cannot train; expected for example {wanted}. Change `objective`, `rollout` or "
        "`module`, or begin with an experiment (experiment=ar_tokens, experiment=ar_chunk3f)."
    )


def average(cfg: DictConfig) -> Iterator[str]:
    """A moving average in 16 bits would not move."""
    precision = str(cfg.trainer.precision)
    if _is_enabled(cfg, "ema") and precision in ("bf16-true", "16-true"):
        yield (
            f"trainer.precision is {precision}, which keeps weights in 16 bits, where a moving average does not move; "
            "expected bf16-mixed or 32-true. Change `trainer.precision`, or set callbacks.ema.enabled=false."
        )


def unused_parameters(cfg: DictConfig) -> Iterator[str]:
    """With one chunk nothing is written to memory, and the parameters that write have no gradient."""
    strategy = cfg.strategy.strategy
    if not isinstance(strategy, DictConfig) or strategy.get("find_unused_parameters") is not False:
        return
    counts = [OmegaConf.select(cfg, "objective.num_chunks")] if "objective" in cfg.module else []
    if _is_enabled(cfg, "curriculum"):
        for node in cfg.callbacks.curriculum.schedules:
            counts += [point[1] for point in node.points] if node.key == "objective.num_chunks" else []
    if 1 in counts:
        yield (
            "objective.num_chunks is 1 (or will be, by callbacks.curriculum), so the parameters that write memory have "
            "no gradient, which this strategy must be told. Set strategy.strategy.find_unused_parameters=true."
        )


MODEL_RULES = [diffusion, tokens, average, unused_parameters]


def _built(node: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all")


def _plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def _is_enabled(cfg: DictConfig, name: str) -> bool:
    node = cfg.callbacks.get(name)
    return node is not None and bool(node.get("enabled", True))
