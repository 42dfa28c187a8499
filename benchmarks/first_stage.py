"""The first stages on held-out clips: PSNR, SSIM and sharpness beside a linear code, and the speed of the video VAE.

The linear code is the principal components of 4x8x8 blocks of the training clips, 16 numbers a block. Figures are means
over clips with paired bootstrap intervals of the difference; "pooled" is one PSNR of all squared errors together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import write_result
from datamodules.loading.reading import SplitReader
from datamodules.shards import DatasetInfo, video_member
from longtake.encoders.cosmos_tokenizer import VideoFSQ
from longtake.encoders.video_vae import VideoVAE, VideoVAENetwork
from longtake.media.read import read_video
from longtake.metrics.bootstrap import bootstrap
from longtake.metrics.frames import psnr, sharpness, ssim

_BATCH = 4


def run(argv: list[str]) -> int:
    """Prints a table of quality and one of speed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks first_stage", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/doom_64x48"), help="folder of a set with pixels")
    parser.add_argument("--weights", default="video_vae_doom", help="as encoder.video.weights")
    parser.add_argument("--tokens", default="video_fsq_doom", help="the discrete one, as encoder.video.weights")
    parser.add_argument("--split", default="test")
    parser.add_argument("--noise", type=float, default=0.1, help="also decode latents with so much noise")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    info = DatasetInfo.load(args.data, "--data")
    encoder, tokenizer = VideoVAE(args.weights), VideoFSQ(args.tokens)
    linear = _linear_code(info, encoder.geometry.channels)
    noise = torch.Generator().manual_seed(0)

    def noisy(video: Tensor) -> Tensor:
        latents = encoder.encode(video)
        return encoder.decode(latents + args.noise * torch.randn(latents.shape, generator=noise))

    codes = {
        "linear code": lambda video: linear.decode(linear.encode(video[:, 0]))[0][:, None].clamp(-1, 1),
        "video VAE": lambda video: encoder.decode(encoder.encode(video)),
        f"video VAE, noise {args.noise:g}": noisy,
        "video tokens (8x8x8)": lambda video: tokenizer.decode(tokenizer.encode(video)).clamp(-1, 1),
    }
    quality, statistics = _quality(info, args.split, codes, encoder)
    speed = _speed(args.weights)
    write_result("first_stage", {"quality": quality, "latents": statistics, "frames_per_s": speed}, args.output)
    return 0


@torch.no_grad()
def _linear_code(info: DatasetInfo, channels: int) -> VideoVAENetwork:
    network = VideoVAENetwork(channels).eval()  # its residual parts are zero until they are trained
    count, total, product = 0, torch.zeros(1), torch.zeros(1)
    for video in _clips(info, "train"):
        blocks = network.blocks(video[:, 0]).double()
        count, total, product = count + len(blocks), total + blocks.sum(0), product + blocks.T @ blocks
    mean = total / count
    network.begin_linear(mean.float(), product / count - torch.outer(mean, mean))
    return network


@torch.no_grad()
def _quality(
    info: DatasetInfo, split: str, codes: dict[str, Callable[[Tensor], Tensor]], encoder: VideoVAE
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in codes}
    latents = []
    for video in _clips(info, split):
        truth = (video[:, 0] + 1) / 2
        latents.append(encoder.encode(video)[:, 0])
        for name, code in codes.items():
            recon = (code(video)[:, 0] + 1) / 2
            values = {
                "psnr_db": psnr(recon, truth),
                "ssim": ssim(recon, truth),
                "sharpness_ratio": sharpness(recon) / sharpness(truth).clamp(min=1e-6),
                "squared_error": (recon - truth).double().square().flatten(1).mean(1),
                "seam": _seam(recon, truth),
            }
            for key, value in values.items():
                found[name].setdefault(key, []).append(value)
    figures = {name: {key: torch.cat(parts) for key, parts in rows.items()} for name, rows in found.items()}
    first = next(iter(figures.values()))["psnr_db"]
    print(f"{info.root}, {split}: {len(first)} clips")
    print(f"  {'':24} {'PSNR':>7} {'pooled':>7} {'over linear [95 %]':>22} {'SSIM':>7} {'sharpness':>10} {'seam':>6}")
    result = {}
    for name, rows in figures.items():
        gain = bootstrap((rows["psnr_db"] - first).numpy())
        row = {key: float(value.mean()) for key, value in rows.items() if key != "squared_error"}
        row["psnr_pooled_db"] = float(-10 * rows["squared_error"].mean().log10())
        row |= {"gain_db": gain.mean, "gain_low_db": gain.low, "gain_high_db": gain.high}
        result[name] = row
        print(
            f"  {name:24} {row['psnr_db']:7.2f} {row['psnr_pooled_db']:7.2f} "
            f"{f'{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]':>22} {row['ssim']:7.3f} "
            f"{row['sharpness_ratio']:10.2f} {row['seam']:6.2f}"
        )
    return result, _statistics(torch.cat(latents))


def _seam(recon: Tensor, truth: Tensor) -> Tensor:
    """Returns how much larger the error of frame-to-frame changes is between groups of 4 frames than inside, [b]."""
    error = (recon.diff(dim=1) - truth.diff(dim=1)).double().square().mean(dim=(2, 3, 4))
    between = torch.zeros(error.shape[1], dtype=torch.bool)
    between[0::4] = True  # frame 0 -> 1, 4 -> 5, ...
    return (error[:, between].mean(1) / error[:, ~between].mean(1)).sqrt()


def _statistics(latents: Tensor) -> dict[str, float]:
    """Prints and returns what normalised latents [n t c h w] are like."""
    std = latents.std(dim=(0, 1, 3, 4))
    centred = latents - latents.mean(dim=(0, 1, 3, 4))[:, None, None]
    neighbours = {
        "time": (centred[:, 1:] * centred[:, :-1]).mean(),
        "rows": (centred[..., 1:, :] * centred[..., :-1, :]).mean(),
        "columns": (centred[..., 1:] * centred[..., :-1]).mean(),
    }
    variance = centred.square().mean()
    found = {f"correlation_{name}": float(value / variance) for name, value in neighbours.items()}
    found |= {"std_min": float(std.min()), "std_max": float(std.max()), "largest": float(latents.abs().max())}
    print("  normalised latents: " + "  ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


@torch.no_grad()
def _speed(weights: str) -> dict[str, float]:
    """Prints and returns pixel frames a CPU second of one core (fair on a busy machine), clip by clip of 64x48."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    video = torch.rand(1, 1, 97, 3, 48, 64) * 2 - 1
    found = {}
    for dtype in ("float32", "bfloat16"):
        encoder = VideoVAE(weights, dtype)
        latents = encoder.encode(video)
        _, state = encoder.decode_stream(latents[:, :, :3])
        found[f"encode_{dtype}"] = 97 / _seconds(lambda: encoder.encode(video))  # noqa: B023 (called at once)
        found[f"decode_{dtype}"] = 97 / _seconds(lambda: encoder.decode(latents))  # noqa: B023
        stream = _seconds(lambda: encoder.decode_stream(latents[:, :, 3:6], state))  # noqa: B023
        found[f"stream_{dtype}"] = 12 / stream
    torch.set_num_threads(threads)
    print("  frames a second of one core: " + "  ".join(f"{name} {rate:.0f}" for name, rate in found.items()))
    return found


def _seconds(call: Callable[[], object], rounds: int = 7) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return sorted(times)[rounds // 2]


def _clips(info: DatasetInfo, split: str) -> Iterator[Tensor]:
    """Yields the first view of the clips of a split, [b 1 t c h w] in [-1, 1]."""
    reader = SplitReader(info, split)
    member = video_member(info.source.view_names[0], info.source.view_names)
    for first in range(0, len(reader), _BATCH):
        rows = range(first, min(first + _BATCH, len(reader)))
        clips = np.stack([read_video(reader[row].read(member), verified=True) for row in rows])
        yield torch.from_numpy(clips).permute(0, 1, 4, 2, 3)[:, None].float() / 127.5 - 1
