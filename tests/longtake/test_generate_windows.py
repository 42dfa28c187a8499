"""What a sliding window is told: its own part of the actions, as a clip of training has them."""

from __future__ import annotations

import torch

from longtake.generate_windows import window_actions


def test_a_window_begins_with_a_null_action_as_every_clip_of_training() -> None:
    actions = torch.arange(8.0, 17.0)[None, :, None]  # of frames 8 to 16
    assert window_actions(actions, 9, ratio=4)[0].tolist() == [[0, 0, 0, 0], [9, 10, 11, 12], [13, 14, 15, 16]]


def test_past_the_end_of_the_video_the_last_action_is_repeated() -> None:
    two = torch.arange(1.0, 3.0)[None, :, None].expand(3, -1, -1)
    assert window_actions(two, 5, ratio=4).tolist() == [[[0, 0, 0, 0], [2, 2, 2, 2]]] * 3
    alone = window_actions(two[:, :1], 5, ratio=4)  # an overlap of one frame is all that is left: the video goes on so
    assert alone.tolist() == [[[0, 0, 0, 0], [1, 1, 1, 1]]] * 3
