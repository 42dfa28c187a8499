"""Encodes a set of clips once: pixels -> latents or tokens, captions -> word ids or embeddings: training never does.

python -m scripts.cache_latents input=data/doom_64x48 output=data/doom_64x48_latents [key=value ...]
"""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from datamodules.shards import DatasetInfo
from launcher.entry import entry_point
from scripts.make_shards import num_cores, summary


def main(cfg: DictConfig) -> None:
    """Encodes the set that the config names and says what came out."""
    from hydra.utils import instantiate

    from datamodules.sources.encoded import EncodedSource
    from datamodules.writing.build import build_dataset

    start = time.monotonic()
    encoder = OmegaConf.to_container(cfg.encoder, resolve=True)
    assert isinstance(encoder, dict)
    settings = {name: cfg[name] for name in ("input", "start_stride", "num_frames", "dtype")}
    info = build_dataset(
        EncodedSource(video=encoder["video"], text=encoder.get("text"), **settings),
        Path(cfg.output),
        request={"source": {**settings, "encoder": encoder}},
        settings=instantiate(cfg.writer, _convert_="all"),
        num_workers=num_cores() if cfg.num_workers is None else cfg.num_workers,
        overwrite=cfg.overwrite,
        progress=cfg.progress,
    )
    print("\n".join([*summary(info), *_codes(info), f"made in {time.monotonic() - start:.0f} s"]))


def _codes(info: DatasetInfo) -> list[str]:
    """Returns what there is in place of pixels and captions, a line each."""
    latents, tokens = info.source.latents, info.source.tokens
    if latents is None:
        assert tokens is not None, "a cached set holds latents or tokens"
        grid = "x".join(map(str, tokens["grid"]))
        return [f"  {grid} of {tokens['vocab_size']} tokens by encoder {tokens['encoder_fingerprint']}"]
    words = (latents["text"] or {}).get("words") or []
    return [
        f"  latents of {latents['channels']} channels by encoder {latents['encoder_fingerprint']}",
        f"  text: {f'{len(words)} words' if words else 'none' if latents['text'] is None else 'embeddings'}",
    ]


if __name__ == "__main__":
    entry_point(main, "cache_latents")
