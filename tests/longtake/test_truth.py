"""The truth beside a rollout: the right frames for every chunk, read as they are needed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.media.read import read_video
from longtake.media.window_reader import FrameReader, ViewsReader
from longtake.media.write import encode_video
from longtake.rollout.plan import TrainedFor
from longtake.rollout.sliding_plan import SlidingPlan, plan_sliding
from longtake.streaming import VideoChunk, to_uint8, to_unit_range
from longtake.truth import TrueVideo, truth_of
from tests.block_code import BlockCode

TRAINED = TrainedFor(rollouts=("sliding_window",), chunk_lat=3, starts_lat=(0, 1, 2))
CPU = torch.device("cpu")


def plan_of(overlap: int, frames: int) -> SlidingPlan:
    return plan_sliding(num_frames_px=frames, context_px=1 if overlap else 0, overlap_px=overlap, trained=TRAINED)


def chunks_of(plan: SlidingPlan) -> list[VideoChunk]:
    found = []
    for index in range(plan.num_chunks):
        start, stop = plan.frames_of(index)
        found.append(VideoChunk(index, start, np.zeros((1, 2, stop - start, 16, 16, 3), np.uint8), 0))
    return found


@pytest.mark.parametrize("overlap", [0, 1, 5])
@pytest.mark.parametrize("there", [24, 30, 40])
def test_a_video_read_as_needed_is_the_video_held_whole(tmp_path: Path, overlap: int, there: int) -> None:
    """Of 30 frames that are rolled out the truth has fewer, as many, or more."""
    noise = np.random.default_rng(0).integers(0, 256, (2, there, 16, 16, 3), np.uint8)
    paths = [tmp_path / f"{view}.mp4" for view in range(2)]
    for path, frames in zip(paths, noise, strict=True):
        path.write_bytes(encode_video(frames, fps=Fraction(10)))
    video = np.stack([read_video(path) for path in paths])
    readers = ViewsReader([FrameReader(path, key="a", size=(16, 16)) for path in paths])
    plan, codec = plan_of(overlap, 30), BlockCode()
    whole, streamed = (truth_of(told, codec, plan, CPU) for told in (video, TrueVideo(readers, there)))
    for chunk in chunks_of(plan):
        one, two = whole.of(chunk), streamed.of(chunk)
        wanted = video[:, chunk.start : min(chunk.stop, there)]
        assert np.array_equal(one.frames, wanted)
        assert np.array_equal(two.frames, wanted)
        for found in (one, two):
            if chunk.start == 0:
                assert found.before is None
            elif chunk.start <= there:
                assert found.before is not None
                assert np.array_equal(found.before, video[:, chunk.start - 1 : chunk.start])
        start, stop = plan.windows.window_of(chunk.index)
        assert np.array_equal(one.recoded, two.recoded)
        if stop > there:
            assert one.recoded.shape[1] == 0
            continue
        coded = to_uint8(codec.decode(codec.encode(to_unit_range(video[None, :, start:stop]))))[0]
        assert np.array_equal(one.recoded, coded[:, chunk.start - start : chunk.stop - start])
