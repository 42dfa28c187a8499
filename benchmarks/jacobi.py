"""Speculative Jacobi decoding against plain decoding of a trained token model, in turn: time and passes a token.

Both draw from the same distribution. Held-out clips of the data that the weights were trained on; the given latents are
true ones, the rest of the trained length is drawn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import paired, write_result
from launcher.compose import compose
from launcher.predict_jobs import prepared
from launcher.recorded import scored_clips
from launcher.stored import use_stored
from longtake.errors import ConfigError
from longtake.generate_tokens import TokenModel
from longtake.rollout.jacobi import JacobiRollout
from longtake.rollout.noise import NoiseKey
from longtake.rollout.tokens import DecodeStats, TokenRollout
from longtake.token_evaluation import TokenClip
from longtake.types import Clip


def run(argv: list[str]) -> int:
    """Prints tokens a second of both, and how many passes a token takes, for every window and draft."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks jacobi", description=__doc__)
    parser.add_argument("--ckpt", required=True, help="a run folder, a .safetensors file or a .ckpt of a token model")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--drafts", nargs="+", choices=["previous", "above"], default=["previous", "above"])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--set", nargs="*", default=[], help="keys of conf/predict.yaml")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    model, clips = _prepared(args)
    settings = {"temperature": args.temperature, "top_p": args.top_p}
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), **settings, "batch": args.batch}
    print(f"{len(clips)} clips, batch {args.batch}, {figures['threads']} threads, T {args.temperature}, p {args.top_p}")
    for draft in args.drafts:
        for window in args.windows:
            stats = DecodeStats()
            ours = _speed(model, clips, args.batch, JacobiRollout(**settings, window=window, draft=draft), stats)
            plain = _speed(model, clips, args.batch, TokenRollout(**settings), DecodeStats())
            result = paired(ours, plain, args.rounds)
            row = result.row(f"window {window}, draft {draft}: Jacobi | plain", "tokens/s")
            print(f"{row}; passes a token {stats.passes_per_token:.3f}", flush=True)
            figures[f"window {window}, draft {draft}"] = {
                **result.to_json(),
                "passes_per_token": stats.passes_per_token,
            }
            write_result("jacobi", figures, args.output)  # after every row, so that a run cut short keeps its rows
    return 0


def _prepared(args: argparse.Namespace) -> tuple[TokenModel, list[TokenClip]]:
    overrides = [f"ckpt={args.ckpt}", f"eval_clips={args.clips}", *args.set]
    use_stored(overrides)
    cfg = compose("predict", overrides)
    model = prepared(cfg)
    if not isinstance(model, TokenModel):
        raise ConfigError(f"{args.ckpt} holds no token model; expected one of experiment=ar_tokens. Change `--ckpt`.")
    return model, list(scored_clips(cfg, model))


def _speed(
    model: TokenModel, clips: Sequence[TokenClip], batch: int, rollout: TokenRollout, stats: DecodeStats
) -> Callable[[], float]:
    def tokens_a_second() -> float:
        drawn, start = 0, time.perf_counter()
        for first in range(0, len(clips), batch):
            drawn += _roll_out(model, clips[first : first + batch], rollout, stats)
        return drawn / (time.perf_counter() - start)

    return tokens_a_second


def _roll_out(model: TokenModel, clips: Sequence[TokenClip], rollout: TokenRollout, stats: DecodeStats) -> int:
    """Draws the latents that are not given, and returns how many tokens that were."""
    tokens = torch.stack([torch.from_numpy(clip.tokens) for clip in clips])
    num_lat = model.spec.grid_lat[0]
    actions = None
    if model.spec.action_names and clips[0].actions is not None:
        actions = torch.stack([torch.from_numpy(clip.actions) for clip in clips])
    told = model.conditions(Clip(actions=actions, key=[clip.key for clip in clips]), num_lat)
    key = NoiseKey(0, tuple(clip.key for clip in clips))
    context = tokens[:, :, : model.start_lat]
    stream = rollout(model.network, context, told, num_lat, key, packed=model.packed)  # type: ignore[arg-type]
    for _ in stream:
        pass
    stats.tokens += stream.stats.tokens
    stats.passes += stream.stats.passes
    return stream.stats.tokens
