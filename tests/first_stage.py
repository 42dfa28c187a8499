"""Small first stages with random weights, and a set of clips that they can code, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.sources.base import RawSample, Source, SourceInfo, Task, VideoSpec
from longtake.encoders.cosmos_layers import Past
from longtake.encoders.cosmos_network import CosmosNetwork
from longtake.encoders.cosmos_tokenizer import KIND as TOKENS_KIND
from longtake.encoders.video_vae import KIND, VideoVAENetwork
from longtake.pretrained.weights_file import write_weights

NODE: dict[str, Any] = {
    "_target_": "longtake.encoders.video_vae.VideoVAENetwork",
    "channels": 4,
    "encoder_widths": [8, 12, 16],
    "encoder_blocks": [1, 1, 1],
    "decoder_widths": [8, 12, 16],
    "decoder_blocks": [1, 1, 2],
}
TOKENS_NODE: dict[str, Any] = {
    "_target_": "longtake.encoders.cosmos_network.CosmosNetwork",
    "levels": [8, 8, 8, 5, 5, 5],
    "ratio_time": 8,
    "ratio_space": 8,
    "channels": 8,
    "channels_mult": [1, 2],
    "num_res_blocks": 1,
    "patch_size": 4,
    "z_channels": 16,
    "legacy": True,
    "temporal_attention": True,
}


def random_tokens_network(seed: int = 0, **changes: Any) -> CosmosNetwork:
    """Returns a small tokenizer network whose norms and biases are not those of the start, and that uses many codes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arguments = {name: value for name, value in TOKENS_NODE.items() if name != "_target_"}
        network = CosmosNetwork(**{**arguments, **changes})
        for parameter in network.parameters():
            if parameter.ndim == 1 or not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        with torch.no_grad():
            latents = network.latents(random_blocks(17, b=8, height=32, width=48)[:, 0], Past(keeps=False)).flatten(
                0, 3
            )
        network.begin_codes(latents.mean(0), latents.T.cov())
    return network.eval()


def random_tokens_weights(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> str:
    """Writes the weights of a random tokenizer and returns their path."""
    path = folder / f"tokens_{seed}_{str(dtype).removeprefix('torch.')}.safetensors"
    tensors = {name: value.to(dtype) for name, value in random_tokens_network(seed).state_dict().items()}
    write_weights(path, tensors, {"kind": TOKENS_KIND, "network": TOKENS_NODE})
    return str(path)


def random_network(seed: int = 0) -> VideoVAENetwork:
    """Returns a network in which no part is zero, so that everything that is wired has an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = VideoVAENetwork(**{name: value for name, value in NODE.items() if name != "_target_"})
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        network.mean.normal_()
        network.std.uniform_(0.5, 2.0)
    return network


def random_weights(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> str:
    """Writes the weights of a random network and returns their path."""
    path = folder / f"first_stage_{seed}_{str(dtype).removeprefix('torch.')}.safetensors"
    tensors = {name: value.to(dtype) for name, value in random_network(seed).state_dict().items()}
    write_weights(path, tensors, {"kind": KIND, "network": NODE})
    return str(path)


def random_video(num_frames: int, *, b: int = 1, v: int = 1, height: int = 16, width: int = 24) -> torch.Tensor:
    """Returns noise in [-1, 1], [b v t c h w]."""
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand((b, v, num_frames, 3, height, width), generator=generator) * 2 - 1


def random_blocks(num_frames: int, *, b: int = 1, v: int = 1, height: int = 16, width: int = 24) -> torch.Tensor:
    """Returns 8x8 blocks of random colours that change slowly, so that tokens differ, in [-1, 1], [b v t c h w]."""
    generator = torch.Generator().manual_seed(num_frames)
    coarse = torch.rand((b, v, num_frames, 3, height // 8, width // 8), generator=generator) * 2 - 1
    slow = coarse[:, :, [max(0, frame - (frame + 3) % 4) for frame in range(num_frames)]]
    return slow.repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1)


class NoisyClips(Source):
    """Two views of noise that drifts, with actions and two captions, in a size that the first stage can code."""

    def __init__(self, num_tasks: int = 3, per_task: int = 2, num_frames: int = 18) -> None:
        self.num_tasks, self.per_task, self.num_frames = num_tasks, per_task, num_frames

    def info(self) -> SourceInfo:
        return SourceInfo(
            name="noisy",
            licence="CC0",
            origin="made by the tests",
            video=VideoSpec(Fraction(35, 3), 16, 32),
            view_names=("front", "rear"),
            action_names=("clip", "frame"),
        )

    def tasks(self) -> list[Task]:
        return [Task(f"t{n}", "val" if n % 3 == 2 else "train", {"number": n}) for n in range(self.num_tasks)]

    def samples(self, task: Task) -> Iterator[RawSample]:
        for index in range(self.per_task):
            number = 10 * task.payload["number"] + index
            yield RawSample(
                key=f"s{number:03d}",
                episode=f"episode-{number}",
                views={"front": drifting(self.num_frames, number), "rear": drifting(self.num_frames, number + 500)},
                actions=np.stack([np.full(self.num_frames, number), np.arange(self.num_frames)], 1).astype(np.float32),
                captions=["a square moves", "ein Quadrat läuft"],
            )


def drifting(num_frames: int, seed: int) -> np.ndarray:
    """Returns smooth noise that moves a pixel a frame, uint8 [t 16 32 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 16, 3), dtype=np.uint8)
    wide = np.kron(coarse, np.ones((4, 4, 1), dtype=np.uint8))
    return np.stack([np.roll(wide, t, axis=1)[:, :32] for t in range(num_frames)])
