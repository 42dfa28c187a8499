"""What a run is about to train on, said once at the start, and refused where it does not fit the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from datamodules.shards import DatasetInfo
from longtake.errors import ConfigError

log = logging.getLogger("longtake")

FEW_CLIPS = 100
"""A training split with fewer clips is learned by heart; said as a warning."""


def check_requirements(infos: list[DatasetInfo], wanted: Mapping[str, Any]) -> None:
    """Checks that the data has what the model was built for.

    Args:
        infos: every set that is read.
        wanted: what the model needs; entries that are absent or None are not checked:
            "action_dim": columns of actions, "state_dim": columns of states, "vocab_size": number of tokens,
            "latent_channels": channels of latents, "num_views": views.

    Raises:
        ConfigError: with both numbers.
    """
    for info in infos:
        source = info.source
        tokens, latents = source.tokens or {}, source.latents or {}
        there: dict[str, tuple[Any, str, str]] = {
            "action_dim": (len(source.action_names), "columns of actions", "data.action_dim"),
            "state_dim": (len(source.state_names), "columns of states", "data.state_dim"),
            "vocab_size": (tokens.get("vocab_size"), "tokens in the vocabulary", "network.vocab_size"),
            "latent_channels": (latents.get("channels"), "latent channels", "encoder/video"),
            "num_views": (len(source.view_names), "views", "data.views"),
        }
        for name, number in wanted.items():
            if number is None or name not in there or (name == "vocab_size" and not tokens and source.video):
                continue  # pixels are tokenised by the model's own encoder
            found, what, key = there[name]
            if found != number:
                names = f" ({', '.join(source.action_names)})" if name == "action_dim" and source.action_names else ""
                raise ConfigError(
                    f"the model is built for {number} {what}, {info.root} has {found or 0}{names}; expected the same "
                    "number. "
                    f"Change `{key}`, or the data set."
                )


def log_summary(infos: list[DatasetInfo], splits: Iterable[str]) -> None:
    """Logs size, geometry and columns of every set, and warns where there is little to learn from."""
    for info in infos:
        source, video = info.source, info.source.video
        size = f"{video.width}x{video.height} at {float(video.fps):.4g} fps" if video else "no pixels"
        log.info("data %s: %s, %d view(s), licence %s", info.root, size, len(source.view_names), source.licence)
        for label, names in (
            ("actions", source.action_names),
            ("states", source.state_names),
            ("control", source.control_types),
        ):
            if names:
                log.info("  %s (%d): %s", label, len(names), ", ".join(names))
        for split in splits:
            if split not in info.splits:
                continue
            part = info.splits[split]
            lengths = ", ".join(f"{count} of {length} frames" for length, count in list(part.lengths.items())[:6])
            more = " ..." if len(part.lengths) > 6 else ""
            log.info(
                "  %-5s %6d clips, %7.3f h, %3d shards (%s%s)",
                split,
                part.num_samples,
                info.hours(split),
                len(part.shards),
                lengths,
                more,
            )
        if info.skipped.get("count"):
            log.info(
                "  %d items were left out when the set was made; see skipped in dataset.json", info.skipped["count"]
            )
        train = info.splits.get("train")
        if train is not None and train.num_samples < FEW_CLIPS:
            log.warning(
                "%s has %d training clips; with fewer than %d a model learns them by heart",
                info.root,
                train.num_samples,
                FEW_CLIPS,
            )
