"""Layers of the Cosmos discrete video tokenizers: causal in time, factorised into space and time.

Written after the released code (nvidia-cosmos/cosmos-predict1, Apache-2.0), with its parameter names, so released
weights fit as they are. What differs is the layout and the past. Feature maps are [n t h w c]: convolutions over one
pixel are matmuls, those over space and those over time run as 2-D convolutions over folded axes. What a layer needs of
earlier frames comes from a `Past`, so a video can be coded piece by piece.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""For each layer that looks back the frames that it needs again, [n t h w c]."""

_EPS = 1e-6


class Past:
    """What the layers of one pass know of earlier frames, in the order in which they ask.

    Args:
        state: what the pass over the frames before left behind; None at the start of a clip.
        keeps: whether this pass leaves a state behind; training does not need one.
    """

    def __init__(self, state: State | None = None, *, keeps: bool = True) -> None:
        self.is_start = state is None
        self._old, self._new, self._keeps = iter(state or ()), [], keeps

    @property
    def state(self) -> State:
        """What the pass over the next frames needs."""
        return tuple(self._new)

    def extend(self, x: Tensor, count: int, at_start: int) -> Tensor:
        """Returns frames with those before them; at a start the first frame stands for those.

        Args:
            x: [n t h w c].
            count: earlier frames that are needed, at most.
            at_start: copies of the first frame at the start of a clip.
        """
        earlier = x[:, :1].expand(-1, at_start, -1, -1, -1) if self.is_start else next(self._old).to(x.dtype)
        whole = torch.cat([earlier, x], dim=1)
        if self._keeps:
            self._new.append(whole[:, whole.shape[1] - count :].clone())
        return whole

    def extend_all(self, x: Tensor) -> Tensor:
        """Returns frames with all frames of the clip before them."""
        whole = x if self.is_start else torch.cat([next(self._old).to(x.dtype), x], dim=1)
        if self._keeps:
            self._new.append(whole)
        return whole


class Convolution(nn.Module):
    """A convolution over one pixel, over space (3x3, zeros beyond the edges) or over time (3 frames, causal).

    Args:
        width_in: channels of the input.
        width_out: channels of the output.
        kernel: (time, rows, columns): (1, 1, 1), (1, 3, 3) or (3, 1, 1).
    """

    def __init__(self, width_in: int, width_out: int, kernel: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        assert kernel in ((1, 1, 1), (1, 3, 3), (3, 1, 1)), f"no convolution over {kernel} here"
        self.conv3d = nn.Conv3d(width_in, width_out, kernel)
        self.kernel = kernel

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Returns [n t h w c] of the same."""
        if self.kernel[1] > 1:
            return self.over_space(x)
        return self.over_time(past.extend(x, 2, 2)) if self.kernel[0] > 1 else self.over_pixels(x)

    def over_pixels(self, x: Tensor) -> Tensor:
        """Applies a kernel of one pixel."""
        return F.linear(x, self.conv3d.weight.flatten(1), self.conv3d.bias)

    def over_space(self, x: Tensor, stride: int = 1) -> Tensor:
        """Applies a 3x3 kernel frame by frame. With stride 2 zeros are added on the right and below only."""
        pictures = x.flatten(0, 1).permute(0, 3, 1, 2)  # n c h w, channels last in memory
        if stride > 1:
            pictures = F.pad(pictures, (0, 1, 0, 1))
        out = F.conv2d(pictures, self.conv3d.weight[:, :, 0], self.conv3d.bias, stride, 1 if stride == 1 else 0)
        return out.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])

    def over_time(self, x: Tensor, stride: int = 1) -> Tensor:
        """Applies a kernel of 3 frames to frames that begin with those before the first."""
        pictures = x.flatten(2, 3).permute(0, 3, 1, 2)  # n c t (h w)
        out = F.conv2d(pictures, self.conv3d.weight[..., 0], self.conv3d.bias, (stride, 1))
        return out.permute(0, 2, 3, 1).contiguous().unflatten(2, x.shape[2:4])


class FrameNorm(nn.Module):
    """Normalises each frame by its own mean and variance, over all channels and places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        pictures = x.flatten(0, 1).permute(0, 3, 1, 2)
        weight, bias = self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype)
        out = F.group_norm(pictures, 1, weight, bias, _EPS)
        return out.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


class Factorised(nn.Sequential):
    """A convolution over space, then one over time."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(Convolution(width_in, width_out, (1, 3, 3)), Convolution(width_out, width_out, (3, 1, 1)))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        for layer in self:
            x = layer(x, past)
        return x


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); where the width changes x goes through a matrix."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(width_in)
        self.conv1 = Factorised(width_in, width_out)
        self.norm2 = FrameNorm(width_out)
        self.conv2 = Factorised(width_out, width_out)
        self.nin_shortcut = Convolution(width_in, width_out) if width_in != width_out else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        features = self.conv1(F.silu(self.norm1(x)), past)
        features = self.conv2(F.silu(self.norm2(features)), past)
        return (x if self.nin_shortcut is None else self.nin_shortcut(x, past)) + features


class Attention(nn.Module):
    """Attention of one head with a residual connection.

    Args:
        width: channels.
        over: "space", the places of a frame see each other; "time", each place sees itself in this frame and before.
    """

    def __init__(self, width: int, over: str) -> None:
        super().__init__()
        assert over in ("space", "time"), over
        self.over = over
        self.norm = FrameNorm(width)
        self.q, self.k, self.v, self.proj_out = (Convolution(width, width) for _ in range(4))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        features = self.norm(x)
        q, k, v = (layer(features, past) for layer in (self.q, self.k, self.v))
        if self.over == "space":
            q, k, v = (part.flatten(0, 1).flatten(1, 2)[:, None] for part in (q, k, v))  # (n t) 1 (h w) c
            seen = F.scaled_dot_product_attention(q, k, v)[:, 0].view_as(x)
        else:
            k, v = past.extend_all(k), past.extend_all(v)
            q, k, v = (part.permute(0, 2, 3, 1, 4).flatten(0, 2)[:, None] for part in (q, k, v))  # (n h w) 1 t c
            num, total = q.shape[2], k.shape[2]
            mask = torch.ones(num, total, dtype=torch.bool, device=x.device).tril(total - num) if num > 1 else None
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]
            seen = seen.unflatten(0, (x.shape[0], *x.shape[2:4])).permute(0, 3, 1, 2, 4)
        return x + self.proj_out(seen, past)


class Downsample(nn.Module):
    """Halves rows and columns, or frames, or all: a strided convolution plus the mean of what it replaces."""

    def __init__(self, width: int, *, space: bool, time: bool) -> None:
        super().__init__()
        self.conv1 = Convolution(width, width, (1, 3, 3)) if space else None
        self.conv2 = Convolution(width, width, (3, 1, 1)) if time else None
        self.conv3 = Convolution(width, width) if space or time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.conv1 is not None:
            mean = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
            x = self.conv1.over_space(x, stride=2) + mean
        if self.conv2 is not None:
            whole = past.extend(x, 1, 2)
            mean = whole[:, 1:].unflatten(1, (-1, 2)).mean(2)
            x = self.conv2.over_time(whole, stride=2) + mean
        return x if self.conv3 is None else self.conv3(x, past)


class Upsample(nn.Module):
    """Doubles frames (the first of a clip stays one), or rows and columns, or all: copies plus a convolution."""

    def __init__(self, width: int, *, space: bool, time: bool) -> None:
        super().__init__()
        self.conv1 = Convolution(width, width, (3, 1, 1)) if time else None
        self.conv2 = Convolution(width, width, (1, 3, 3)) if space else None
        self.conv3 = Convolution(width, width) if space or time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.conv1 is not None:
            x = x.repeat_interleave(2, dim=1)[:, 1 if past.is_start else 0 :]
            x = x + self.conv1(x, past)
        if self.conv2 is not None:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = x + self.conv2(x, past)
        return x if self.conv3 is None else self.conv3(x, past)
