"""The clock: which source frame each output frame shows, and which rows of numbers belong to it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from datamodules.sources.frame_stream import TimedFrame, VideoReader
from datamodules.sources.resample import Span, check_rows, on_clock, resample_actions, resample_states
from datamodules.sources.resize import fit_frame
from longtake.errors import BadSampleError
from tests.datamodules.sources.numbered_clips import encode, numbered_frame, read_number


def frames_at(times: list[Fraction], last: Fraction) -> list[TimedFrame]:
    durations = [*(b - a for a, b in zip(times, times[1:], strict=False)), last]
    return [
        TimedFrame(i, time, duration, Fraction(1), Image.new("RGB", (2, 2)).copy)
        for i, (time, duration) in enumerate(zip(times, durations, strict=True))
    ]


def shown(times: list[Fraction], last: Fraction, fps: Fraction, slack: Fraction = Fraction(0)) -> list[int]:
    return [span.index for span, _ in on_clock(iter(frames_at(times, last)), fps=fps, slack=slack)]


@pytest.mark.parametrize(
    ("rate", "fps", "count"), [(25, 12, 50), (30, 10, 31), (24, 24, 24), (60, 7, 100), (10, 30, 9)]
)
def test_every_tick_shows_the_frame_on_screen(rate: int, fps: int, count: int) -> None:
    times = [Fraction(i, rate) for i in range(count)]
    expected = []
    tick = 0
    while Fraction(tick, fps) < Fraction(count, rate):
        expected.append(max(i for i, time in enumerate(times) if time <= Fraction(tick, fps)))
        tick += 1
    assert shown(times, Fraction(1, rate), Fraction(fps)) == expected


def test_a_variable_frame_rate_follows_the_time_stamps_and_not_their_mean() -> None:
    times = [Fraction(t, 10) for t in (0, 1, 2, 9, 10)]
    assert shown(times, Fraction(1, 10), Fraction(10)) == [0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4]


def test_the_clock_starts_with_the_first_frame() -> None:
    times = [Fraction(5) + Fraction(i, 10) for i in range(4)]
    assert shown(times, Fraction(1, 10), Fraction(10)) == [0, 1, 2, 3]


def test_times_rounded_to_milliseconds_lose_and_repeat_no_frame() -> None:
    times = [Fraction(round(i * 1000 / 30), 1000) for i in range(300)]
    assert shown(times, Fraction(33, 1000), Fraction(30), slack=Fraction(1, 2000)) == list(range(300))
    assert shown(times, Fraction(33, 1000), Fraction(30)) != list(range(300)), "the slack is what makes it so"


def test_a_broken_time_stamp_does_not_repeat_a_frame_without_end() -> None:
    with pytest.raises(BadSampleError, match="stay on screen"):
        shown([Fraction(0), Fraction(10**9)], Fraction(1), Fraction(10))


def test_webm_and_variable_mp4_come_out_of_real_containers_in_step() -> None:
    webm = VideoReader(encode([numbered_frame(i) for i in range(40)], rate=30, container="webm", codec="libvpx"))
    pairs = on_clock(webm.frames(), fps=Fraction(30), slack=webm.summary().slack)
    assert [read_number(np.asarray(frame.load())) for _, frame in pairs] == list(range(40))
    pts = [0, 1, 2, 12, 13, 14]
    variable = encode([numbered_frame(i) for i in range(6)], pts=pts, time_base=Fraction(1, 10))
    reader = VideoReader(variable)
    pairs = on_clock(reader.frames(), fps=Fraction(5), slack=reader.summary().slack)
    assert [read_number(np.asarray(frame.load())) for _, frame in pairs] == [0, 2, 2, 2, 2, 2, 3, 5]
    assert reader.summary().num_frames == 6


def spans_of(indices: list[int], rate: int) -> list[Span]:
    pairs = [(index, Fraction(index, rate)) for index in indices]
    return [Span(*pair, previous) for pair, previous in zip(pairs, [None, *pairs], strict=False)]


def test_actions_gather_everything_since_the_frame_before() -> None:
    rows = np.arange(10, dtype=np.float32)[:, None].repeat(4, axis=1)
    rows[4, 0] = -50
    spans = spans_of([0, 2, 5, 5, 9], 10)
    out = resample_actions(rows, spans, rules=["max", "mean", "sum", "last"], fps=None)
    assert out.tolist() == [
        [0, 0, 0, 0],
        [2, 1.5, 3, 2],
        [-50, 4, 12, 5],
        [5, 5, 0, 5],  # the same source frame again: nothing new happened
        [9, 7.5, 30, 9],
    ]
    assert np.array_equal(
        resample_actions(rows, spans_of(list(range(10)), 10), rules=["sum"] * 4, fps=None)[1:], rows[1:]
    )


def test_a_key_held_for_one_frame_survives_a_lower_frame_rate() -> None:
    rows = np.zeros((12, 1), np.float32)
    rows[7] = 1
    out = resample_actions(rows, spans_of([0, 3, 6, 9], 30), rules=["max"], fps=None)
    assert out[:, 0].tolist() == [0, 0, 0, 1]


def test_rows_on_their_own_clock_are_shared_out_by_overlap() -> None:
    rows = np.array([[0], [10], [20], [30], [40]], np.float32)  # row r acts in the second up to r
    spans = spans_of([0, 3, 6], 2)  # 0, 1.5 and 3 s
    assert resample_actions(rows, spans, rules=["sum"], fps=Fraction(1))[:, 0].tolist() == [0, 20, 40]
    assert resample_actions(rows, spans, rules=["last"], fps=Fraction(1))[:, 0].tolist() == [0, 20, 30]
    assert np.allclose(resample_actions(rows, spans, rules=["mean"], fps=Fraction(1))[:, 0], [0, 40 / 3, 80 / 3])
    assert resample_states(rows, spans, fps=Fraction(1))[:, 0].tolist() == [0, 10, 30]


def test_a_wrong_number_of_rows_names_both() -> None:
    with pytest.raises(BadSampleError, match=r"11 rows.*12 frames"):
        check_rows("actions", np.zeros((11, 1)), num_frames=12, seconds=Fraction(1), fps=None)
    with pytest.raises(BadSampleError, match=r"50 rows.*make 40"):
        check_rows("actions", np.zeros((50, 1)), num_frames=12, seconds=Fraction(2), fps=Fraction(20))
    check_rows("actions", np.zeros((41, 1)), num_frames=12, seconds=Fraction(2), fps=Fraction(20))


def test_fitting_keeps_the_middle_the_bars_and_the_size() -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200
    image = Image.fromarray(wide)
    assert (fit_frame(image, height=20, width=20, mode="crop")[:, 2:-2] == 200).all()
    padded = fit_frame(image, height=20, width=20, mode="pad")
    assert padded.shape == (20, 20, 3)
    assert not padded[:6].any()
    assert not padded[-6:].any()
    assert (padded[8:12, 9:11] == 200).all()
    stretched = fit_frame(image, height=20, width=30, mode="stretch")
    assert stretched.shape == (20, 30, 3)
    assert (stretched[:, 12:18] == 200).all()
    assert not stretched[:, :8].any()
    # Pixels twice as wide as high: the same picture is shown 240 wide, so a square takes its middle sixth.
    narrow = fit_frame(image, height=40, width=40, mode="crop", pixel_aspect=Fraction(2))
    assert (narrow[:, 2:-2] == 200).all()


def test_shrinking_averages_and_label_colours_stay_exact() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(fit_frame(Image.fromarray(stripes), height=8, width=8, mode="crop").mean() - 127.5) < 3
    nearest = fit_frame(Image.fromarray(stripes), height=8, width=8, mode="crop", nearest=True)
    assert set(np.unique(nearest)) <= {0, 255}
