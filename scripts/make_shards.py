"""Makes a set of shards from a source of clips.

python -m scripts.make_shards source=vizdoom output=data/doom num_clips=200
python -m scripts.make_shards source=video_folder input=<dir> output=<dir> [key=value ...]
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launcher.entry import entry_point
from longtake.errors import ConfigError

FIRST_REASONS = 5
MANY_SHARDS = 1000


def main(cfg: DictConfig) -> None:
    """Builds the set that the config describes and says what is in it."""
    from hydra.utils import instantiate

    from datamodules.writing.build import build_dataset

    start = time.monotonic()
    hand_down(cfg)
    source = instantiate(cfg.source)
    info = build_dataset(
        source,
        Path(cfg.output),
        request={"source": OmegaConf.to_container(cfg.source, resolve=True)},
        settings=instantiate(cfg.writer, _convert_="all"),
        num_workers=num_cores() if cfg.num_workers is None else cfg.num_workers,
        overwrite=cfg.overwrite,
        progress=cfg.progress,
    )
    seconds = time.monotonic() - start
    sheet = write_sheet(info, info.root / "contact_sheet.png")
    print("\n".join([*summary(info), f"made in {seconds:.0f} s", *([f"contact sheet: {sheet}"] if sheet else [])]))


def hand_down(cfg: DictConfig) -> None:
    """Gives the source the `num_clips` and `seed` of the command line.

    Raises:
        ConfigError: the source makes no given number of clips.
    """
    uses_it = "num_clips" in cfg.source or "${num_clips}" in OmegaConf.to_yaml(cfg.source)
    if cfg.num_clips is not None and not uses_it:
        raise ConfigError(
            f"num_clips is {cfg.num_clips}, but this source takes all clips that its input holds; expected null. "
            "Change `num_clips`, or `input`."
        )
    for key in ("num_clips", "seed"):
        if key in cfg.source and cfg[key] is not None:
            cfg.source[key] = cfg[key]


def write_sheet(info, path: Path) -> Path | None:
    """Writes a contact sheet of a set; returns its path, None where there is no video to show."""
    from datamodules.writing.preview import dataset_sheet
    from longtake.media.write import save_image

    image = dataset_sheet(info)
    if image is None:
        return None
    save_image(path, image)
    return path


def summary(info) -> list[str]:
    """Returns what a set holds, in lines."""
    lines = [f"{info.root}: {info.source.name}, licence {info.source.licence}"]
    for name, split in info.splits.items():
        num_bytes = sum(shard.bytes for shard in split.shards)
        lines.append(
            f"  {name:<6} {split.num_samples:>7} clips  {info.hours(name):8.3f} h  "
            f"{len(split.shards):>4} shards  {num_bytes / 2**20:9.1f} MiB"
        )
        if len(split.shards) > MANY_SHARDS:
            lines.append(f"  {name} has {len(split.shards)} shards; a larger writer.max_samples_per_shard makes fewer")
    count, examples = info.skipped["count"], info.skipped["examples"]
    if count:
        lines.append(f"  skipped {count}, all named in {info.root / 'skipped.jsonl'}; the first:")
        lines += [f"    {row['name']}: {row['reason']}" for row in examples[:FIRST_REASONS]]
    return lines


def num_cores() -> int:
    """Returns how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    entry_point(main, "make_shards")
