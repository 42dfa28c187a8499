"""Three-axis rotary positions (time, height, width), as in Wan 2.1.

Adjacent channels (2i, 2i+1) of a head are one complex number that is turned by position x frequency. The channels of
a head are split into time, height and width parts, each with its own frequencies. Angles are float64, so an absolute
position is exact at any length of video.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Returns how many channels of a head turn with time, height and width; 128 gives 44, 42, 42."""
    assert head_dim % 2 == 0, f"rotary positions need an even head width, got {head_dim}"
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


@functools.lru_cache(maxsize=64)
def _frequencies(head_dim: int, theta: float, with_time: bool) -> Tensor:
    """Turns per unit of position, float64 [3 head_dim/2]: a column is non-zero in the row of its own axis only."""
    table = torch.zeros(3, head_dim // 2, dtype=torch.float64)
    start = 0
    for axis, width in enumerate(axis_widths(head_dim)):
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        if axis > 0 or with_time:
            table[axis, start : start + width // 2] = theta**-exponents
        start += width // 2
    return table


def rotary_table(
    positions: Tensor,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    theta: float = 10000.0,
    with_time: bool = True,
) -> Tensor:
    """Returns cos and sin for every position.

    Args:
        positions: (t, h, w), int64 [... 3].
        head_dim: channels of a head.
        dtype: of the activations; the table is float64 for float64 and float32 for everything else.
        device: where the table goes; it is computed on the CPU.
        theta: base of the frequencies.
        with_time: False leaves out the time axis.

    Returns:
        [... head_dim/2 2], cos in [..., 0].
    """
    angles = positions.double().cpu() @ _frequencies(head_dim, theta, with_time)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return table.to(device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Returns `x` [... l heads hd] turned by a `rotary_table` [... l hd/2 2], in the dtype of `x`.

    The turn itself is computed in the table's dtype.
    """
    pairs = x.to(table.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor fuses real arithmetic and calls out for complex
        cos, sin = table.unsqueeze(-3).unbind(-1)
        real, imag = pairs.unbind(-1)
        turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table).unsqueeze(-2))
    return turned.flatten(-2).to(x.dtype)
