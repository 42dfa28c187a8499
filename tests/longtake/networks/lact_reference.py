"""LaCT's teacher-forcing pass, written down literally from the description of the released model and nothing else.

One long sequence, a dense bool mask, loops over chunks and heads, the fast-weight update by autograd: slow, float64,
and sharing no code with `longtake`. Weights come as a state dict of a VideoDiT with LaCT and Wan's text embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass
class Sizes:
    """Sizes that no weight tells; `kv_tokens` 0: noisy chunks see all tokens of the clean chunk before them."""

    heads: int
    fw_heads: int
    frames: int
    height: int
    width: int
    kv_tokens: int = 0
    momentum: bool = False


def forward(
    weights: Weights, sizes: Sizes, clean: Tensor, noisy: Tensor, sigma: Tensor, text: Tensor
) -> tuple[Tensor, list]:
    """Returns velocities [s c f h w] of all slots of one sample and what the slots are.

    Args:
        clean: [chunks c f h w].
        noisy: [chunks repeats c f h w].
        sigma: noise levels [chunks repeats].
        text: [tokens d].
    """
    slots, inputs, levels = [], [], []
    for i in range(clean.shape[0]):
        if i > 0:
            slots.append(("clean", i - 1, 0))
            inputs.append(clean[i - 1])
            levels.append(torch.zeros((), dtype=torch.float64))
        for r in range(noisy.shape[1]):
            slots.append(("noisy", i, r))
            inputs.append(noisy[i, r])
            levels.append(sigma[i, r])
    x = torch.cat([patches(chunk) for chunk in inputs]) @ weights["patch_embedding.weight"].flatten(1).T
    x = x + weights["patch_embedding.bias"]
    size = sizes.frames * sizes.height * sizes.width
    embedding = torch.stack([time_embedding(weights, 1000 * level) for level in levels])  # one a slot
    projected = linear(weights, "time_projection", silu(embedding)).view(len(slots), 6, -1)
    context = linear(weights, "text.mlp.2", gelu(linear(weights, "text.mlp.0", text)))
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for layer in range(layers):
        x = block(weights, f"blocks.{layer}.", sizes, x, projected, context, slots, size)
    modulation = weights["head.modulation"] + embedding[:, None]  # [s 2 d]
    shift, scale = (part.repeat_interleave(size, 0) for part in modulation.unbind(1))
    out = linear(weights, "head.head", layer_norm(x) * (1 + scale) + shift)
    return torch.stack([unpatch(chunk, sizes) for chunk in out.split(size)]), slots


def patches(latents: Tensor) -> Tensor:
    """[c f h w] to rows of (c, 2, 2), frame after frame, row after row."""
    c, f, h, w = latents.shape
    rows = []
    for t in range(f):
        for i in range(0, h, 2):
            for j in range(0, w, 2):
                rows.append(latents[:, t, i : i + 2, j : j + 2].flatten())
    return torch.stack(rows)


def unpatch(rows: Tensor, sizes: Sizes) -> Tensor:
    """Rows of (2, 2, c) to [c f h w]."""
    channels = rows.shape[1] // 4
    out = torch.zeros(channels, sizes.frames, 2 * sizes.height, 2 * sizes.width, dtype=rows.dtype)
    row = 0
    for t in range(sizes.frames):
        for i in range(sizes.height):
            for j in range(sizes.width):
                patch = rows[row].view(2, 2, channels).permute(2, 0, 1)
                out[:, t, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch
                row += 1
    return out


def block(
    w: Weights, p: str, sizes: Sizes, x: Tensor, projected: Tensor, context: Tensor, slots: list, size: int
) -> Tensor:
    modulation = (w[p + "modulation"] + projected).repeat_interleave(size, 0)  # [tokens 6 d]
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
    x = x + gate1 * lact(w, p + "self_attn.", sizes, layer_norm(x) * (1 + scale1) + shift1, slots, size)
    normed = layer_norm(x) * w[p + "norm3.weight"] + w[p + "norm3.bias"]
    x = x + cross_attention(w, p + "cross_attn.", sizes, normed, context)
    hidden = gelu(linear(w, p + "ffn.0", layer_norm(x) * (1 + scale2) + shift2))
    return x + gate2 * linear(w, p + "ffn.2", hidden)


def lact(w: Weights, p: str, sizes: Sizes, x: Tensor, slots: list, size: int) -> Tensor:
    d = x.shape[1]
    wq, wk, wv = w[p + "qkv.weight"].split(d)
    bq, bk, bv = w[p + "qkv.bias"].split(d)
    q = rms_norm(x @ wq.T + bq, w[p + "norm_q.weight"])
    k = rms_norm(x @ wk.T + bk, w[p + "norm_k.weight"])
    v = x @ wv.T + bv
    times = torch.cat([sizes.frames * chunk + torch.arange(sizes.frames) for _, chunk, _ in slots])
    positions = [(int(t), i, j) for t in times for i in range(sizes.height) for j in range(sizes.width)]  # one a token
    attended = masked_attention(rotated(q, positions, sizes), rotated(k, positions, sizes), v, sizes, slots, size)
    m = p + "mixer."
    scale, offset = w[m + "qk_scale"], w[m + "qk_offset"]
    fast_q = rotated(q * scale[:, 0] + offset[:, 0], positions, sizes)
    fast_k = rotated(k * scale[:, 1] + offset[:, 1], positions, sizes)
    rates = torch.nn.functional.softplus(linear(w, m + "lr_proj", x) + math.log(math.exp(0.001) - 1))
    gate = silu(linear(w, m + "ttt_scale_proj", x))
    shares = torch.sigmoid(linear(w, m + "momentum_proj", x)) if sizes.momentum else None
    out = []
    for head in range(sizes.fw_heads):
        width = d // sizes.fw_heads
        part = slice(head * width, (head + 1) * width)
        qh, kh, vh = unit(fast_q[:, part]), unit(fast_k[:, part]), v[:, part]
        start = [w[m + name][head] for name in ("w0", "w1", "w2")]
        now, previous = list(start), None
        read: list[Tensor] = []
        for index, (role, _, _) in enumerate(slots):
            rows = slice(index * size, (index + 1) * size)
            if role == "clean":
                lr = rates[rows, 3 * head : 3 * head + 3]
                change = update_by_autograd(now, kh[rows], vh[rows], lr)
                if shares is not None:
                    share = shares[rows, head].mean()
                    change = (
                        change if previous is None else [a + share * b for a, b in zip(change, previous, strict=True)]
                    )
                    previous = change
                now = [rescaled(a + b, c) for a, b, c in zip(now, change, start, strict=True)]
            read.append(fast(now, qh[rows]))
        out.append(rms_norm(torch.cat(read), w[m + "output_norm.weight"]))
    return linear(w, p + "o", attended + gate * torch.cat(out, dim=1))


def fast(weights: list[Tensor], x: Tensor) -> Tensor:
    """w1 (silu(w0 x) * (w2 x)), row by row."""
    w0, w1, w2 = weights
    return (silu(x @ w0.T) * (x @ w2.T)) @ w1.T


def update_by_autograd(weights: list[Tensor], k: Tensor, v: Tensor, rates: Tensor) -> list[Tensor]:
    """One gradient step of size 1 on -sum rate * <f(k), v>, each matrix with its own rate."""
    change = []
    for j in range(3):
        pulled = [weight * 1 for weight in weights]  # the gradient is by this step's weights, not by what made them
        if not pulled[j].requires_grad:
            pulled[j].requires_grad_()
        loss = -(rates[:, j] * (fast(pulled, k) * v).sum(dim=1)).sum()
        change.append(-torch.autograd.grad(loss, pulled[j], create_graph=True)[0])
    return change


def rescaled(weight: Tensor, target: Tensor) -> Tensor:
    return weight / (weight.norm(dim=1, keepdim=True) + 1e-5) * target.norm(dim=1, keepdim=True)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, slots: list, size: int) -> Tensor:
    tokens, d = q.shape
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    keep = sizes.kv_tokens or size
    for a, (role, chunk, _) in enumerate(slots):
        mask[a * size : (a + 1) * size, a * size : (a + 1) * size] = True
        for b, (other, other_chunk, _) in enumerate(slots):
            if role == "noisy" and other == "clean" and other_chunk == chunk - 1:
                mask[a * size : (a + 1) * size, (b + 1) * size - keep : (b + 1) * size] = True
    out = []
    for head in range(sizes.heads):
        part = slice(head * (d // sizes.heads), (head + 1) * (d // sizes.heads))
        scores = (q[:, part] @ k[:, part].T) / math.sqrt(d // sizes.heads)
        out.append(torch.softmax(scores.masked_fill(~mask, -math.inf), dim=1) @ v[:, part])
    return torch.cat(out, dim=1)


def cross_attention(w: Weights, p: str, sizes: Sizes, x: Tensor, context: Tensor) -> Tensor:
    d = x.shape[1]
    q = rms_norm(linear(w, p + "q", x), w[p + "norm_q.weight"])
    kv = linear(w, p + "kv", context)
    k, v = rms_norm(kv[:, :d], w[p + "norm_k.weight"]), kv[:, d:]
    out = []
    for head in range(sizes.heads):
        part = slice(head * (d // sizes.heads), (head + 1) * (d // sizes.heads))
        out.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d // sizes.heads), dim=1) @ v[:, part])
    return linear(w, p + "o", torch.cat(out, dim=1))


def rotated(x: Tensor, positions: list[tuple[int, int, int]], sizes: Sizes) -> Tensor:
    """Adjacent channel pairs of each head as complex numbers; c - 2 (c//3), c//3, c//3 of them for t, h, w."""
    pairs = x.shape[1] // sizes.heads // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = torch.zeros(len(positions), pairs, dtype=torch.float64)
    for row, position in enumerate(positions):
        column = 0
        for axis, count in enumerate(counts):
            for i in range(count):
                angles[row, column] = position[axis] * 10000 ** (-2 * i / (2 * count))
                column += 1
    turned = torch.view_as_complex(x.reshape(len(positions), sizes.heads, pairs, 2)) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.view_as_real(turned).reshape(x.shape)


def time_embedding(w: Weights, t: Tensor) -> Tensor:
    half = w["time_embedding.0.weight"].shape[1] // 2
    angles = torch.stack([t * 10000 ** (-i / half) for i in range(half)])
    sinusoid = torch.cat((torch.cos(angles), torch.sin(angles)))
    return linear(w, "time_embedding.2", silu(linear(w, "time_embedding.0", sinusoid)))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-6)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=1, keepdim=True) + 1e-6) * weight


def unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + 1e-5)
