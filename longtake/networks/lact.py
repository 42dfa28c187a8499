"""LaCT: fast weights, updated once a chunk, beside attention to a window of chunks, sharing q, k and v.

Zhang et al. 2025, "Test-Time Training Done Right", arXiv 2505.23884, the AR-video layer as released:

    out = attention(q, k, v) + silu(gate(x)) * norm(f_W(q'))        the gate is zero at init

with q' = q * scale + offset, rotated, of length 1 over a fast-weight head. A context slot is written first and then
read, so it reads itself back; target i has what contexts 0 .. i-1 left; targets never write:

    W -> t0.0 t0.1 | write c0 -> c0 t1.0 t1.1 | write c1 -> c1 t2.0 t2.1

Apart from the release: rows always return to the norms of the initial weights (its inference takes the current ones),
momentum acts in training and rollout alike, and a rollout's state belongs to its row of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.errors import ConfigError, unknown_choice
from longtake.networks.attention import AttentionPlan, MixerInput, SlotAttention
from longtake.networks.elementwise import RMSNorm, compute_dtype
from longtake.networks.fast_weights import NORM_EPS, FastWeights, read, row_norm, update
from longtake.networks.layout import ChunkLayout
from longtake.networks.memory import LayerMemory
from longtake.networks.rope import rotary_table, rotate

logger = logging.getLogger("longtake")

BASE_RATE = 1e-3  # the learning rate of a token before training
RATE_OFFSET = math.log(math.expm1(BASE_RATE))  # softplus of it


@dataclass(frozen=True)
class Step:
    """Slots that read the same fast weights, after what was written before them; indices into the slots of a pass."""

    writes: int | None
    reads: tuple[int, ...]


def fast_weight_steps(layout: ChunkLayout) -> list[Step]:
    """Returns the order in which the slots of a pass write and read fast weights."""
    steps: list[tuple[int | None, list[int]]] = [(None, [])]
    for index, slot in enumerate(layout.slots):
        if slot.seen and slot.role == "context":
            steps.append((index, []))
        steps[-1][1].append(index)
        if slot.seen and slot.role == "target":
            steps.append((index, []))
    return [Step(writes, tuple(reads)) for writes, reads in steps if reads or writes is not None]


@dataclass(frozen=True)
class LaCTPlan:
    """What the LaCT layers of one pass share.

    Attributes:
        window: the plan of the window attention.
        steps: reads and writes of the fast weights in order; slots are read in slot order.
        writers: slots that write, in order [n]; None: none.
        table: rotary table of the fast branch [s l hd/2 2].
        writer_table: its rows of the writers [n l hd/2 2].
    """

    window: AttentionPlan
    steps: tuple[Step, ...]
    writers: Tensor | None
    table: Tensor
    writer_table: Tensor | None


class LaCT(SlotAttention):
    """Fast weights and window attention.

    Args:
        dim: width.
        num_heads: attention heads.
        fw_heads: fast-weight heads; each works on dim / fw_heads channels.
        inter_multi: hidden width of the fast network over its input width.
        window: how many of the latest clean chunks attention sees.
        sinks: how many of the first it sees besides.
        kv_tokens: how many of the last tokens of each chunk of the window it sees; None: all.
        time_rope: "absolute" turns what is written by its time index (released weights); "none" leaves time out, so
            that nothing in the fast weights depends on where in the video a chunk is.
        trained_frames_lat: latent frames that weights with time_rope = absolute were trained on; past them a warning.
        momentum: keeps a running sum of the updates.
        muon: orthogonalises each update.
        muon_steps: Newton-Schulz iterations.
        theta: base of the rotary frequencies.
    """

    new_parameters: ClassVar[tuple[str, ...]] = (
        "w0",
        "w1",
        "w2",
        "qk_scale",
        "qk_offset",
        "lr_proj",
        "output_norm",
        "ttt_scale_proj",
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        fw_heads: int = 2,
        inter_multi: int = 2,
        window: int = 1,
        sinks: int = 0,
        kv_tokens: int | None = None,
        time_rope: Literal["absolute", "none"] = "absolute",
        trained_frames_lat: int | None = None,
        momentum: bool = False,
        muon: bool = False,
        muon_steps: int = 5,
        theta: float = 10000.0,
    ) -> None:
        super().__init__(dim, num_heads, window=window, sinks=sinks, kv_tokens=kv_tokens, theta=theta)
        if fw_heads < 1 or dim % fw_heads:
            raise ConfigError(
                f"network.mixer.fw_heads is {fw_heads} with a width of {dim}; expected a divisor of the width. Change "
                "`network.mixer.fw_heads`."
            )
        if time_rope not in ("absolute", "none"):
            raise unknown_choice("time_rope", time_rope, ("absolute", "none"), "network.mixer.time_rope")
        self.fw_heads, self.fw_dim, self.fw_hidden = fw_heads, dim // fw_heads, dim // fw_heads * inter_multi
        self.time_rope, self.trained_frames_lat = time_rope, trained_frames_lat
        self.muon_steps = muon_steps if muon else 0
        self.w0 = nn.Parameter(torch.empty(fw_heads, self.fw_hidden, self.fw_dim))
        self.w1 = nn.Parameter(torch.empty(fw_heads, self.fw_dim, self.fw_hidden))
        self.w2 = nn.Parameter(torch.empty(fw_heads, self.fw_hidden, self.fw_dim))
        self.qk_scale, self.qk_offset = nn.Parameter(torch.empty(dim, 2)), nn.Parameter(torch.empty(dim, 2))
        self.lr_proj = nn.Linear(dim, 3 * fw_heads)
        self.output_norm = RMSNorm(self.fw_dim, eps=1e-6)
        self.ttt_scale_proj = nn.Linear(dim, 1)
        self.momentum_proj = nn.Linear(dim, fw_heads) if momentum else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial fast weights and closes the gate; rates and momentum begin as torch draws them."""
        for linear in (self.lr_proj, self.momentum_proj):
            if linear is not None:
                linear.reset_parameters()
        for weight in (self.w0, self.w1, self.w2):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)
        nn.init.zeros_(self.ttt_scale_proj.weight)
        nn.init.zeros_(self.ttt_scale_proj.bias)

    def prepare(
        self, layout: ChunkLayout, memory: LayerMemory | None, *, device: torch.device, dtype: torch.dtype
    ) -> Any:
        window = self._attention_plan(layout, memory or LayerMemory(), device, dtype)
        table = window.table
        if self.time_rope == "none":
            table = rotary_table(
                layout.positions(), self.head_dim, dtype=dtype, device=device, theta=self.theta, with_time=False
            )
        elif self.trained_frames_lat is not None and layout.end_lat > self.trained_frames_lat:
            _warn_beyond(self.trained_frames_lat)
        steps = fast_weight_steps(layout)
        if memory is None and not steps[-1].reads:
            steps.pop()  # nobody reads what the last slot would write
        writers = [step.writes for step in steps if step.writes is not None]
        index = torch.tensor(writers, device=device) if writers else None
        return LaCTPlan(window, tuple(steps), index, table, None if index is None else table.index_select(0, index))

    def forward(self, inputs: MixerInput, memory: LayerMemory | None) -> tuple[Tensor, LayerMemory | None]:
        plan: LaCTPlan = inputs.plan
        attended = self.attend(inputs, plan.window, memory)
        out, weights = self._scan(inputs, plan, memory.fast if memory else {})
        gate = F.silu(self.ttt_scale_proj(inputs.x))
        mixed = attended + gate * out.to(attended.dtype)
        remembered = self.remember(inputs, memory)
        if remembered is not None and plan.writers is not None:
            remembered = dataclasses.replace(remembered, fast=self._state(weights))
        return mixed, remembered

    def num_flops(self, layout: ChunkLayout) -> int:
        """As `SlotAttention.num_flops`, with the fast weights: reads three matmuls a token, writes six."""
        steps = fast_weight_steps(layout)
        reads = sum(len(step.reads) for step in steps)
        writes = sum(step.writes is not None and bool(step.reads) for step in steps)
        per_token = 2 * 3 * self.dim * self.fw_hidden
        return super().num_flops(layout) + (reads + 2 * writes) * layout.grid.tokens * per_token

    def rates(self, x: Tensor) -> Tensor:
        """Returns the learning rates [... heads 3] of tokens `x` [... d] for W0, W1 and W2, float32 or better."""
        rates = self.lr_proj(x)
        rates = F.softplus(rates.to(torch.promote_types(rates.dtype, torch.float32)) + RATE_OFFSET)
        return rates.unflatten(-1, (self.fw_heads, 3))

    def fast_channels(self, x: Tensor, table: Tensor, column: int) -> Tensor:
        """Returns queries (column 0) or keys (1) [b s l heads hd] as the fast weights take them, [(b n) s l in]."""
        scale, offset = (parameter[:, column].view(x.shape[-2:]) for parameter in (self.qk_scale, self.qk_offset))
        heads = rotate(torch.addcmul(offset, x, scale), table).flatten(-2).unflatten(-1, (self.fw_heads, -1))
        unit = heads / (torch.linalg.vector_norm(heads, dim=-1, keepdim=True) + NORM_EPS)
        return self._by_head(unit.to(x.dtype))

    def _scan(self, inputs: MixerInput, plan: LaCTPlan, fast: dict[str, Tensor]) -> tuple[Tensor, FastWeights]:
        """Returns what every slot reads, normalised, [b s l d], and the fast weights after the pass."""
        b, s, tokens, _ = inputs.x.shape
        initial, dtype = self._initial(b), compute_dtype(inputs.q)
        norms = (row_norm(initial.w0), row_norm(initial.w1), row_norm(initial.w2))
        weights = self._restored(fast) if fast else initial
        low = weights.lowered(dtype)
        q = self.fast_channels(inputs.q, plan.table, 0)
        written = None if plan.writers is None else self._writers(inputs, plan)
        outs, count = [], 0
        for step in plan.steps:
            if step.writes is not None:
                assert written is not None
                k, v, rates = (part[:, count] for part in written[:3])
                momentum = None if written[3] is None else written[3][:, count]
                options = {"momentum": momentum, "muon_steps": self.muon_steps}
                weights = update(weights, k, v, rates, norms=norms, lowered=low, **options)
                low = weights.lowered(dtype)
                count += 1
            if step.reads:
                first, last = step.reads[0], step.reads[-1] + 1
                outs.append(read(low, q[:, first:last].flatten(1, 2)))
        out = self.output_norm(torch.cat(outs, dim=1) if len(outs) > 1 else outs[0])
        return out.view(b, self.fw_heads, s, tokens, -1).permute(0, 2, 3, 1, 4).flatten(-2), weights

    def _writers(self, inputs: MixerInput, plan: LaCTPlan) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns keys, values and rates [(b n) writers l ...] and momentum [(b n) writers] of the slots that write."""
        assert plan.writers is not None
        assert plan.writer_table is not None
        x, k, v = (part.index_select(1, plan.writers) for part in (inputs.x, inputs.k, inputs.v))
        momentum = None
        if self.momentum_proj is not None:
            share = self.momentum_proj(x)
            share = share.to(torch.promote_types(share.dtype, torch.float32)).sigmoid()
            share = share.mean(dim=2) if inputs.key_mask is None else _mean_where(share, inputs.key_mask)
            momentum = share.transpose(1, 2).flatten(0, 1)
        values = self._by_head(v.flatten(-2).unflatten(-1, (self.fw_heads, -1)))
        rates = self.rates(x)
        if inputs.key_mask is not None:
            rates = rates * inputs.key_mask[:, None, :, None, None]
        return self.fast_channels(k, plan.writer_table, 1), values, self._by_head(rates), momentum

    def _by_head(self, x: Tensor) -> Tensor:
        """[b s l heads c] to [(b heads) s l c]."""
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1).contiguous()

    def _initial(self, batch: int) -> FastWeights:
        dtype = torch.promote_types(self.w0.dtype, torch.float32)
        return FastWeights(*(weight.to(dtype).repeat(batch, 1, 1) for weight in (self.w0, self.w1, self.w2)))

    def _restored(self, fast: dict[str, Tensor]) -> FastWeights:
        return FastWeights(**{name: tensor.flatten(0, 1) for name, tensor in fast.items()})

    def _state(self, weights: FastWeights) -> dict[str, Tensor]:
        """The fast weights by name, [b heads ...]."""
        named = {entry.name: getattr(weights, entry.name) for entry in dataclasses.fields(weights)}
        return {name: w.unflatten(0, (-1, self.fw_heads)) for name, w in named.items() if w is not None}


def _mean_where(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the tokens of x [b s l c] that `mask` [b l] has, [b s c]."""
    share = mask / mask.sum(dim=1, keepdim=True)
    return (x * share[:, None, :, None].to(x.dtype)).sum(dim=2)


@functools.lru_cache(maxsize=8)
def _warn_beyond(trained_frames_lat: int) -> None:
    """Says so once."""
    logger.warning(
        "the fast weights see time indices beyond the %d latent frames that they were trained on; expect drift, "
        "or train with network.mixer.time_rope=none",
        trained_frames_lat,
    )
