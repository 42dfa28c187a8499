"""How far the actions of each latent frame move the camera: running totals, and positions that go along with it.

A latent frame of 8 pixel frames may turn the camera by most of what it sees. Attention could add up the actions of
single frames, but in a short training it does not; so their totals are inputs. `Pan` goes one step further: a column of
the picture is not a place in the world while the camera turns, so for half of the heads the rotary positions of a
latent's tokens move with it, and equal positions see equal things.

    columns of latent 1          0 1 2 3 4 5 6 7
    columns of latent 2                0 1 2 3 4 5 6 7      after a turn to the right by three columns
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def latent_motion(actions: Tensor, ratio: int) -> Tensor:
    """Returns the sum of every action column over each latent frame, then the mean of its running sum, [b s f 2a].

    Args:
        actions: one pixel frame after another for each latent frame, float [b s f ratio*a].
        ratio: pixel frames of a latent frame.
    """
    running = actions.unflatten(-1, (ratio, -1)).cumsum(dim=-2)
    return torch.cat((running[..., -1, :], running.mean(dim=-2)), dim=-1)


class MotionEmbedding(nn.Sequential):
    """One vector a latent frame of its motion, [b k 2a] to [b k d]; none at init.

    Args:
        dim: width.
        action_dim: action columns.
        ratio_time: pixel frames of a latent frame; what comes in is divided by it.
    """

    def __init__(self, dim: int, *, action_dim: int, ratio_time: int) -> None:
        last = nn.Linear(dim, dim)
        nn.init.zeros_(last.weight)  # turns are large numbers, and would drown the tokens at first
        nn.init.zeros_(last.bias)
        super().__init__(nn.Linear(2 * action_dim, dim), nn.SiLU(), last)
        self.ratio_time = ratio_time

    def forward(self, motion: Tensor) -> Tensor:
        first: nn.Linear = self[0]  # type: ignore[assignment]
        return super().forward(motion.to(first.weight.dtype) / self.ratio_time)


class Pan(nn.Module):
    """How far rows and columns of every latent frame are from those of the first one: learned shares of the actions.

    A latent frame lies where its pixel frames are on average. Nothing moves at init.

    Args:
        action_dim: action columns.
    """

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, action_dim))

    def forward(self, motion: Tensor) -> Tensor:
        """Returns rows and columns [b k 2] of motion [b k 2a] from the causal start on."""
        total, inside = motion.to(self.weight.dtype).chunk(2, dim=-1)
        where = total.cumsum(dim=1) - total + inside
        return where @ self.weight.mT
