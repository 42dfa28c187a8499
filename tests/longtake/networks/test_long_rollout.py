"""Memory and time a chunk do not depend on the length of the video."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longtake.networks.attention import BlockCausalAttention, WindowAttention
from longtake.networks.lact import LaCT
from longtake.networks.layout import ChunkLayout
from tests.longtake.networks.tiny import tiny_grid, tiny_network, tiny_sequence

MIXERS = {
    "lact": partial(LaCT, time_rope="none", momentum=True, sinks=1),
    "window": partial(WindowAttention, window=2, sinks=2),
}


@dataclass
class Course:
    """What was measured after each chunk, and the largest value of any output."""

    held: list[int] = field(default_factory=list)  # bytes of the memory's tensors
    resident: list[int] = field(default_factory=list)  # bytes of the process
    objects: list[int] = field(default_factory=list)  # Python objects alive; every 50 chunks
    seconds: list[float] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    largest: float = 0.0


def roll(mixer: object, chunks: int) -> Course:
    """Rolls out chunk after chunk, each begun from what the network made of the one before."""
    network = tiny_network(mixer, dtype=torch.float32)  # type: ignore[arg-type]
    sequence = tiny_sequence(batch=1, chunks=1, dtype=torch.float32)
    grid, memory = tiny_grid(sequence), network.empty_memory()
    course = Course()
    x, sigma, conditions = sequence.slots(ChunkLayout.one_shot(grid))
    for chunk in range(chunks):
        layout = ChunkLayout.stream(chunk, grid, commit=chunk > 0)
        both = [x, x] if chunk > 0 else [x]
        levels = [0 * sigma, sigma] if chunk > 0 else [sigma]
        actions = torch.cat([conditions.actions] * len(both), 1)  # type: ignore[list-item]
        told = type(conditions)(text_emb=conditions.text_emb, actions=actions, fps=conditions.fps)
        start = time.process_time()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out, memory = network(torch.cat(both, 1), torch.cat(levels, 1), told, layout, memory)
        course.seconds.append(time.process_time() - start)
        course.flops.append(counter.get_total_flops())
        assert memory is not None
        x = (x - 0.1 * out[:, -1:]).clamp(-3, 3)  # any next chunk that depends on the network
        course.largest = max(course.largest, out.abs().max().item())
        course.held.append(memory.num_bytes)
        course.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
        if chunk % 50 == 5 or chunk == chunks - 1:
            gc.collect()
            course.objects.append(len(gc.get_objects()))
    return course


def check(chunks: int, mixer: str, *, is_timed: bool = False) -> None:
    """Checks the course; the clock is asked only in the slow test, since others may slow a machine for a second."""
    course = roll(MIXERS[mixer], chunks)
    assert len(set(course.held[5:])) == 1  # keys, values and fast weights
    assert course.resident[-1] < 1.02 * course.resident[5]
    assert abs(course.objects[-1] - course.objects[1]) < 50
    assert len(set(course.flops[5:])) == 1
    assert course.flops[5] > 0
    if is_timed:
        quarter = chunks // 4
        early, late = statistics.median(course.seconds[5:quarter]), statistics.median(course.seconds[-quarter:])
        assert late < 1.5 * early
    assert course.largest < 1e3  # neither NaN nor growth without end


@pytest.mark.parametrize("mixer", MIXERS)
def test_two_hundred_chunks(mixer: str) -> None:
    check(200, mixer)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_thousand_chunks(mixer: str) -> None:
    check(1000, mixer, is_timed=True)


def test_the_measure_sees_growth() -> None:
    course = roll(BlockCausalAttention, 12)
    for figures in (course.held, course.flops):
        assert all(later > earlier for earlier, later in zip(figures[1:], figures[2:], strict=False))
