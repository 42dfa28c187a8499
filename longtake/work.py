"""How much work a training step is, and how fast this machine could do it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# Dense matmul peaks in TFLOP/s as the makers state them: (bf16 or fp16, fp32 on tensor cores)
_GPU_PEAKS = {
    "B200": (2250.0, 1100.0),
    "H200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L40": (181.0, 90.5),
    "L4": (121.0, 60.0),
    "A10": (125.0, 62.5),
    "4090": (165.0, 82.6),
}
_SIDE = 1536  # rows and columns of the measured matmul
_ROUNDS = 8


@dataclass(frozen=True)
class Work:
    """What a training step of one rank does: tokens of all slots, and floating-point operations, backward included."""

    tokens: int
    flops: float


@dataclass(frozen=True)
class Ceiling:
    """The fastest matmuls of a device.

    Attributes:
        flops: floating-point operations a second.
        what: where the figure comes from, for people.
    """

    flops: float
    what: str


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Returns the fastest matmul of a device: what the maker states for a known GPU, else the best of a few measured.

    Takes a quarter of a second where it measures.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        model = torch.cuda.get_device_name(device)
        for known, (half, single) in _GPU_PEAKS.items():
            if known in model:
                peak = half if dtype.itemsize == 2 else single
                return Ceiling(peak * 1e12, f"the {peak:,.0f} TFLOP/s that {model} states for {name}")
    a, b = (torch.randn(_SIDE, _SIDE, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_ROUNDS):
        wait_for(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        wait_for(device)
        best = min(best, time.perf_counter() - begin)
    flops = 2 * _SIDE**3 / best
    return Ceiling(flops, f"the {flops / 1e9:,.0f} GFLOP/s that {name} matmuls reach here")


def matmul_dtype(precision: str) -> torch.dtype:
    """Returns the type that matmuls run in under one of Lightning's precisions ("bf16-mixed", "32-true", ...)."""
    for start, dtype in (("bf16", torch.bfloat16), ("16", torch.float16), ("64", torch.float64)):
        if precision.startswith(start):
            return dtype
    return torch.float32


def wait_for(device: torch.device) -> None:
    """Returns when everything that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
