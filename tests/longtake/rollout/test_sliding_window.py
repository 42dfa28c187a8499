"""Window after window with a network that knows the video, so that every frame has exactly one right value."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.rollout.cosmos_noise import cosmos_noise
from longtake.rollout.denoise import noise_of_chunk
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import TrainedFor
from longtake.rollout.sliding_plan import SlidingPlan, plan_sliding
from longtake.rollout.sliding_window import SlidingWindowRollout, WindowChunk, WindowState, WindowStream
from longtake.rollout.solvers import Euler
from longtake.streaming import to_uint8, to_unit_range
from longtake.types import Conditions
from tests.longtake.rollout.identity import KnowsTheVideo, LosslessCodec, frame_numbers

SIZE = (2, 2)


def trained(chunk_px: int) -> TrainedFor:
    return TrainedFor(rollouts=("sliding_window",), chunk_lat=1 + (chunk_px - 1) // 4, starts_lat=(0, 1, 2))


def source(frames: int, views: int = 1, samples: int = 1) -> np.ndarray:
    """Returns random bytes [b v t h w c]."""
    return np.random.default_rng(0).integers(0, 256, (samples, views, frames, *SIZE, 3), np.uint8)


class Run:
    """One rollout of a source, and what its parts saw."""

    def __init__(
        self, video: np.ndarray, chunk: int = 9, overlap: int = 1, given: int | tuple[int, ...] = 0, **settings: Any
    ) -> None:
        state = settings.pop("state", None)
        more = {"num_steps": 2, "guidance": 1.0, **settings}
        self.plan: SlidingPlan = plan_sliding(
            num_frames_px=more.pop("num_frames", video.shape[2]),
            context_px=given,
            overlap_px=overlap,
            trained=trained(chunk),
        )
        self.codec = LosslessCodec(keep=more.pop("keep", True))
        self.network = more.pop("network", None) or KnowsTheVideo(to_unit_range(video))
        rollout = SlidingWindowRollout(chunk_overlap=overlap, **more)
        key = NoiseKey(0, tuple(f"clip-{sample}" for sample in range(len(video))))
        start = to_unit_range(video[:, :, : self.plan.start_needed_px])
        self.stream: WindowStream = rollout(
            self.network, start, self._conditions, self.plan, Euler(shift=1.0), key, codec=self.codec, state=state
        )

    def _conditions(self, chunk: int) -> Conditions:
        return frame_numbers(self.plan.windows.window_of(chunk)[0], self.plan.windows.chunk_px)

    def chunks(self) -> list[WindowChunk]:
        return list(self.stream)

    def video(self) -> np.ndarray:
        return to_uint8(torch.cat([chunk.frames for chunk in self.stream], dim=2))


class Restless:
    """A network whose velocity depends on everything that it is given, so that any difference shows."""

    streams = False

    def grid(self, shape: tuple[int, ...]) -> Any:
        return KnowsTheVideo.grid(self, shape)  # type: ignore[arg-type]

    def __call__(self, x: Tensor, sigma: Tensor, conditions: Conditions, layout: Any, memory: Any = None) -> Any:
        assert conditions.actions is not None
        mixed = x.mean(dim=(2, 3), keepdim=True) + conditions.actions.mean() * 1e-3
        return torch.tanh(x + mixed) - sigma[..., None, None, None] * 0.3 * x, None


# The assembled video


@pytest.mark.parametrize("hand_off", ["float", "uint8"])
@pytest.mark.parametrize("views", [1, 3, 7])
@pytest.mark.parametrize(
    ("chunk", "overlap", "frames"),
    [(9, 0, 36), (9, 1, 33), (9, 5, 25), (29, 1, 85), (29, 5, 77), (29, 5, 101), (93, 1, 277)],
)
def test_the_source_comes_back_bit_for_bit(chunk: int, overlap: int, frames: int, views: int, hand_off: str) -> None:
    video = source(frames, views)
    run = Run(video, chunk, overlap, hand_off=hand_off)
    assert run.plan.num_chunks >= 3
    assert np.array_equal(run.video(), video)


@pytest.mark.parametrize("frames", [1, 5, 8, 26, 34, 39])
@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_ragged_ends_are_padded_and_trimmed(frames: int, overlap: int) -> None:
    video = source(frames, 2, samples=2)
    run = Run(video, 9, overlap)
    assert np.array_equal(run.video(), video)
    assert all(x.shape[3] == 3 for x in run.network.xs)  # every chunk is computed at its full length


@pytest.mark.parametrize("given", [0, 1, 5])
def test_given_frames_are_shown_as_given(given: int) -> None:
    video = source(33, 2)
    run = Run(video, given=given, network=Restless())
    chunks = run.chunks()
    made = to_uint8(torch.cat([chunk.frames for chunk in chunks], dim=2))
    assert np.array_equal(made[:, :, :given], video[:, :, :given])
    assert not np.array_equal(made[:, :, given : given + 1], video[:, :, given : given + 1])
    assert [chunk.num_given for chunk in chunks] == [given, 0, 0, 0]


def test_each_view_has_its_own_given_frames() -> None:
    video = source(17, 3)
    run = Run(video, given=(0, 1, 5))
    made = run.video()
    assert np.array_equal(made, video)
    first = run.network.sigmas[0]  # [b 1 v f]
    assert first[0, 0].tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert run.network.sigmas[-1][0, 0, :, 0].tolist() == [0]  # handed over in every view
    for view, count in enumerate((0, 1, 2)):
        truth = LosslessCodec().encode(to_unit_range(video[:, :, :5]))
        assert torch.equal(run.network.xs[0][:, 0, view, :count], truth[:, view, :count])


# Handing over


@pytest.mark.parametrize(("overlap", "latents"), [(1, 1), (5, 2)])
def test_a_chunk_begins_with_the_end_of_the_one_before(overlap: int, latents: int) -> None:
    run = Run(source(33), overlap=overlap, network=Restless())
    chunks = run.chunks()
    shown = torch.cat([chunk.frames for chunk in chunks], dim=2)
    for index in range(1, run.plan.num_chunks):
        begin = run.plan.windows.window_of(index)[0]
        assert torch.equal(run.codec.encoded[index - 1], shown[:, :, begin : begin + overlap])
        handed = LosslessCodec().encode(run.codec.encoded[index - 1])
        assert torch.equal(chunks[index].latents[:, :, :latents], handed)


def test_8_bit_hand_off_rounds_and_stays_within_half_a_level() -> None:
    exact = Run(source(17), network=Restless())
    chunks = exact.chunks()
    rounded = Run(source(17), network=Restless(), hand_off="uint8")
    rounded.chunks()
    end = chunks[0].frames[:, :, -1:]
    (handed,) = rounded.codec.encoded
    assert torch.equal(handed, to_unit_range(to_uint8(end)))
    error = (handed - end.clamp(-1, 1)) * 127.5
    assert 0.3 < error.abs().max() <= 0.5001
    assert abs(float(error.mean())) < 0.1  # rounded, not cut off: that would darken each chunk by half a level
    assert torch.equal(exact.codec.encoded[0], end)


def test_context_noise_is_told_and_only_on_what_is_handed_over() -> None:
    quiet, noisy = Run(source(17), given=1), Run(source(17), given=1, context_noise=0.25)
    quiet.chunks(), noisy.chunks()
    assert torch.equal(quiet.network.xs[0], noisy.network.xs[0])
    assert noisy.network.sigmas[2][0, 0, 0].tolist() == [0.25, 1, 1]
    clean, mixed = (run.network.xs[2][:, 0, :, :1] for run in (quiet, noisy))
    noise = noise_of_chunk(NoiseKey(0, ("clip-0",)), "context", 1, quiet.network.xs[2][:, 0])[:, :, :1]
    assert torch.allclose(mixed, 0.75 * clean + 0.25 * noise, atol=1e-6)


def test_context_noise_does_not_reach_what_is_decoded() -> None:
    """The network knows the video, so every latent that is not given comes out right whatever noise was told."""
    video = source(33)
    run = Run(video, overlap=5, context_noise=0.5)
    decoded = run.chunks()
    assert np.array_equal(to_uint8(torch.cat([chunk.frames for chunk in decoded], dim=2)), video)
    handed = LosslessCodec().encode(run.codec.encoded[0])
    assert torch.equal(decoded[1].latents[:, :, :2], handed)


# What a chunk depends on


@pytest.mark.parametrize("noise", ["keyed", "cosmos"])
@pytest.mark.parametrize("hand_off", ["float", "uint8"])
def test_more_chunks_leave_the_earlier_ones_as_they_are(noise: str, hand_off: str) -> None:
    short = Run(source(17, 2), network=Restless(), num_frames=17, noise=noise, hand_off=hand_off).video()
    long = Run(source(17, 2), network=Restless(), num_frames=57, noise=noise, hand_off=hand_off).video()
    ragged = Run(source(17, 2), network=Restless(), num_frames=20, noise=noise, hand_off=hand_off).video()
    assert np.array_equal(short, long[:, :, :17])
    assert np.array_equal(ragged, long[:, :, :20])


def test_a_sample_does_not_depend_on_the_others_of_its_batch() -> None:
    alone, together = (Run(source(25, 2, samples), network=Restless()).video() for samples in (1, 3))
    assert np.array_equal(alone[0], together[0])
    assert not np.array_equal(together[0], together[1])


def test_cosmos_noise_is_numpys_stream_of_seed_plus_chunk() -> None:
    like = torch.zeros(1, 3, 2, 4, 2, 2)
    drawn = cosmos_noise(NoiseKey(7, ("a",)), 2, like)
    stream = np.random.RandomState(9).standard_normal((1, 4, 6, 2, 2)).astype(np.float32)  # noqa: NPY002
    for view in range(3):
        for frame in range(2):
            assert np.array_equal(drawn[0, view, frame].numpy(), stream[0, :, 2 * view + frame])
    two = cosmos_noise(NoiseKey(7, ("a", "b")), 2, like.expand(2, -1, -1, -1, -1, -1))
    assert torch.equal(two[:1], drawn)
    with pytest.raises(ConfigError, match="seed is 4294967295.*`seed`"):
        cosmos_noise(NoiseKey(2**32 - 1, ("a",)), 1, like)


def test_memory_does_not_grow_with_the_length() -> None:
    """Tensors alive between two windows, and at the peak all that Python and NumPy hold, for 10 and for 30 windows."""

    def most(frames: int) -> tuple[int, int]:
        gc.collect()  # runs before hold their own conditions
        run = Run(source(9, 7), network=Restless(), num_frames=frames, keep=False)
        tracemalloc.start()
        tensors = max(_tensor_bytes() for chunk in run.stream if chunk.index % 9 == 8)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return tensors, peak

    most(81)  # what is made once
    short, long = most(81), most(241)
    assert long[0] == short[0]
    assert long[1] < short[1] * 1.2 + 20_000


def _tensor_bytes() -> int:
    alive = {thing.data_ptr(): thing.untyped_storage().nbytes() for thing in gc.get_objects() if type(thing) is Tensor}
    return sum(alive.values())


# Going on after an interruption


@pytest.mark.parametrize("settings", [{}, {"hand_off": "uint8", "noise": "cosmos"}, {"context_noise": 0.2}])
@pytest.mark.parametrize(("overlap", "given"), [(0, 0), (1, 1), (5, (0, 1, 5))])
def test_an_interrupted_rollout_goes_on_bit_for_bit(
    tmp_path: Path, overlap: int, given: int | tuple[int, ...], settings: dict[str, Any]
) -> None:
    def run(state: WindowState | None = None) -> Run:
        return Run(source(30, 3), overlap=overlap, given=given, network=Restless(), state=state, **settings)

    whole = run().chunks()
    for stopped_after in range(len(whole) + 1):
        first = run()
        for _ in range(stopped_after):
            next(first.stream)
        torch.save(first.stream.state.state_dict(), tmp_path / "state.pt")
        saved = WindowState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        rest = run(saved)
        assert len(rest.stream) == len(whole) - stopped_after
        for chunk, wanted in zip(rest.chunks(), whole[stopped_after:], strict=True):
            assert (chunk.index, chunk.start, chunk.num_given) == (wanted.index, wanted.start, wanted.num_given)
            assert torch.equal(chunk.frames, wanted.frames)


def test_a_state_of_another_overlap_is_refused() -> None:
    first = Run(source(30), overlap=1)
    next(first.stream)
    with pytest.raises(ConfigError, match="`rollout.chunk_overlap`"):
        Run(source(30), overlap=5, state=first.stream.state)


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hand_off": "bytes"}, "unknown way to hand frames over 'bytes'.*`rollout.hand_off`"),
        ({"noise": "white"}, "unknown kind of noise 'white'.*`rollout.noise`"),
        ({"chunk_overlap": -1}, "rollout.chunk_overlap is -1"),
        ({"chunk_overlap": True}, "rollout.chunk_overlap is True"),
        ({"context_noise": 1.0}, "rollout.context_noise is 1.0"),
    ],
)
def test_mistakes_name_their_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlidingWindowRollout(**settings)


def test_a_wrong_number_of_steps_is_found_before_anything_is_computed() -> None:
    with pytest.raises(ConfigError, match="rollout.num_steps is 0"):
        Run(source(9), num_steps=0)
