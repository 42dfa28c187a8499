"""Context -> target: one clean block is given, the next one is predicted, each block a causal start of its own.

    context slot (block i)  ->  target slot (block i + 1)          9 px and 9 px where a block is 3 latents, 1 + 4 + 4
    target slot (block 0), its first latent clean: an image start

That is all that a rollout ever shows the network: it goes on from the block that it made last. What it made is not what
was filmed, so training worsens the context in some samples: with noise, by a trip through 8-bit pixels, or by a rollout
of the network itself. How often, and how far, are plain numbers that a curriculum may change while training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from longtake.errors import ConfigError, unknown_choice
from longtake.geometry import latent_frames, pixel_frames
from longtake.networks.layout import ChunkLayout, Grid
from longtake.objectives.flow_matching import NoiseLevels, pick
from longtake.objectives.slot_objective import SlotObjective
from longtake.rollout.chunks import MemoryRollout
from longtake.rollout.conditions import of_chunks, of_rows
from longtake.rollout.denoise import Network
from longtake.rollout.noise import NoiseKey, uniform_of_sample
from longtake.rollout.plan import RolloutPlan, TrainedFor
from longtake.rollout.solvers import Solver
from longtake.types import Conditions, LossOutput

MODES = ("clean", "noised", "recoded", "own")
_IMAGE = len(MODES)

ContextTransform = Callable[[Tensor], Tensor]
"""Latents of blocks [b v f c h w] -> those of the same blocks after a trip through 8-bit pixels."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What each sample of a batch is trained on. All on the CPU, int64 [b].

    Attributes:
        mode: index into `MODES`, or one more for an image start.
        first: block that the context comes from: itself, or where the own rollout begins.
        depth: blocks of the own rollout, 0 for other modes. The target is block first + depth + 1 (image start: 0).
    """

    mode: Tensor
    first: Tensor
    depth: Tensor


class ContextTarget(SlotObjective):
    """Velocity error of a block that is told the one before it.

    Args:
        chunk_lat: latent frames of a block.
        block_px: pixel frames of a block, 1 + ratio (chunk_lat - 1).
        num_frames_px: pixel frames of the longest training clips: 2 whole blocks, and one more for every block of own
            rollouts. In shorter clips own rollouts are shorter, and in clips of 2 blocks contexts are clean instead.
        noise_levels: how noise levels are drawn and weighed.
        image_start: share of samples that predict their first block from its first latent alone.
        context: how often the context of the other samples is "clean", "noised", "recoded" (8 bit) or the network's
            "own"; weights, which need not sum to 1.
        context_noise: a noised context gets a level drawn evenly from [0, this], and the network is told it.
        own_depth: own rollouts are 1 to this many blocks long, drawn evenly.
        own_steps: network evaluations a block of own rollouts.
        own_solver: what denoises them.
        text_dropout: see `SlotObjective`.
        action_dropout: see `SlotObjective`.
        joint_dropout: see `SlotObjective`.
    """

    own_starts: ClassVar[bool] = True
    one_context: ClassVar[bool] = True
    gives_in_evaluation: ClassVar[bool] = True

    def __init__(
        self,
        *,
        chunk_lat: int,
        block_px: int,
        num_frames_px: int,
        noise_levels: NoiseLevels,
        own_solver: Solver,
        image_start: float = 0.1,
        context: Mapping[str, float] | None = None,
        context_noise: float = 0.3,
        own_depth: int = 1,
        own_steps: int = 4,
        text_dropout: float = 0.0,
        action_dropout: float = 0.0,
        joint_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            noise_levels=noise_levels,
            first_chunk_clean={"image": 1.0},
            text_dropout=text_dropout,
            action_dropout=action_dropout,
            joint_dropout=joint_dropout,
        )
        if chunk_lat < 2:
            raise ConfigError(
                f"video.chunk_lat is {chunk_lat}; expected 2 latent frames or more, so that a block can start from an "
                "image. Change `video.chunk_lat`."
            )
        for name, value, least, below in (
            ("image_start", image_start, 0, 1),
            ("context_noise", context_noise, 0, 1),
            ("own_depth", own_depth, 1, None),
            ("own_steps", own_steps, 1, None),
        ):
            if value < least or (below is not None and value >= below):
                upto = "" if below is None else f" and less than {below}"
                raise ConfigError(
                    f"objective.{name} is {value}; expected {least} or more{upto}. Change `objective.{name}`."
                )
        self.chunk_lat, self.block_px, self.image_start = chunk_lat, block_px, image_start
        self.context = _checked_weights({"clean": 1.0} if context is None else context)
        self.context_noise, self.own_depth, self.own_steps = context_noise, own_depth, own_steps
        self.own_solver = own_solver
        own_solver.begin(own_steps)
        if num_frames_px % block_px or num_frames_px < 2 * block_px:
            raise ConfigError(
                f"video.num_frames is {num_frames_px}; expected 2 or more blocks of {block_px} frames, that is "
                f"{2 * block_px} and {block_px} more for every block of own rollouts. Change `video.num_frames`."
            )
        longest = num_frames_px // block_px - 2
        if own_depth > max(longest, 1) or (self.context.get("own", 0) > 0 and own_depth > longest):
            raise ConfigError(
                f"own rollouts of {own_depth} blocks are asked for (objective.context.own, objective.own_depth), which "
                f"need clips of {(own_depth + 2) * block_px} frames, and video.num_frames is {num_frames_px}. Change "
                "`video.num_frames` or `objective.own_depth`."
            )

    # What it is trained on

    def frames_lat(self, num_frames_px: int, ratio: int) -> int:
        return latent_frames(num_frames_px, ratio, "video.num_frames", self.chunk_lat)

    def trained_for(self, *, num_frames_px: int, ratio: int) -> TrainedFor:
        if self.block_px != pixel_frames(self.chunk_lat, ratio):
            raise ConfigError(
                f"video.block_frames is {self.block_px}, but blocks of video.chunk_lat={self.chunk_lat} latent frames "
                f"hold {pixel_frames(self.chunk_lat, ratio)} frames. Change `video.block_frames`."
            )
        trained = super().trained_for(num_frames_px=num_frames_px, ratio=ratio)
        return trained if self.image_start > 0 else dataclasses.replace(trained, starts_lat=())

    def chunk_frames(self, num_frames_lat: int) -> int:
        return self.chunk_lat

    def chunks_used(self, num_frames_lat: int) -> int:
        blocks, rest = divmod(num_frames_lat, self.chunk_lat)
        if rest or not blocks:
            raise ConfigError(
                f"a clip has {num_frames_lat} latent frames, which are not whole blocks of {self.chunk_lat}. Change "
                "`data` to clips in such blocks (data.block_frames), or `video.chunk_lat`."
            )
        return blocks

    def layout(self, num_chunks: int, grid: Grid) -> ChunkLayout:
        """Returns one target slot for one block, and a context slot and a target slot for any more."""
        last = min(num_chunks, 2) - 1
        return ChunkLayout.stream(last, grid, commit=last > 0)

    def modes(self, key: NoiseKey) -> Tensor:
        """Returns the mode of each sample, int64 [b] on the CPU: an index into `MODES`, or one more for an image.

        Raises:
            ConfigError: a schedule has made all weights 0.
        """
        context = _checked_weights(self.context)
        share = (1 - self.image_start) / sum(context.values())
        shares = [share * context.get(name, 0.0) for name in MODES]
        return pick(uniform_of_sample(key, "context_mode"), [*shares, self.image_start])

    def pairs(self, key: NoiseKey, num_blocks: int) -> Pairs:
        """Returns what each sample is trained on: which block is its context, in which mode."""
        mode = self.modes(key)
        own, longest = MODES.index("own"), num_blocks - 2
        if longest == 0:  # no block after an own one is known
            mode = torch.where(mode == own, MODES.index("clean"), mode)
        drawn = 1 + (uniform_of_sample(key, "own_depth") * min(self.own_depth, longest)).long()
        depth = torch.where(mode == own, drawn, 0)
        first = (uniform_of_sample(key, "context_block") * (num_blocks - 1 - depth)).long()
        return Pairs(mode, torch.where(mode == _IMAGE, 0, first), depth)

    # The loss

    def __call__(
        self,
        network: Network,
        latents: Tensor,
        conditions: Conditions,
        key: NoiseKey,
        *,
        mask: Tensor | None = None,
        context_transform: ContextTransform | None = None,
    ) -> LossOutput:
        """As `SlotObjective`; `context_transform` sends blocks through 8-bit pixels, for the mode "recoded"."""
        latents = latents if latents.dtype == torch.float64 else latents.float()
        conditions = self._dropped(conditions, key)
        pairs = self.pairs(key, self.chunks_used(latents.shape[2]))
        batch = _Batch(network, rearrange(latents, "b v (n f) c h w -> b n v f c h w", f=self.chunk_lat), conditions)
        parts: list[tuple[float, LossOutput]] = []
        for is_image in (False, True):
            rows = ((pairs.mode == _IMAGE) == is_image).nonzero()[:, 0]
            if len(rows):
                last = (pairs.first + pairs.depth)[rows]
                blocks = torch.zeros(len(rows), 1).long() if is_image else torch.stack([last, last + 1], dim=1)
                slots = batch.blocks_of(rows, blocks)
                if not is_image:
                    slots[:, 0] = self._contexts(batch, slots[:, 0], pairs, rows, key, context_transform)
                told = of_rows(conditions, rows, blocks)
                own_mask = None if mask is None else _mask_of(mask, rows, blocks, self.chunk_lat)
                parts.append((len(rows) / len(key), self._part(network, slots, told, _of_rows(key, rows), own_mask)))
        return LossOutput(
            loss=torch.stack([share * out.loss for share, out in parts]).sum(),
            per_chunk=torch.stack([out.loss.detach() for _, out in parts]),
            logs={"mse": torch.stack([share * out.logs["mse"] for share, out in parts]).sum()},
        )

    @torch.no_grad()
    def evaluate(
        self,
        network: Network,
        latents: Tensor,
        conditions: Conditions,
        key: NoiseKey,
        sigma: float,
        *,
        mask: Tensor | None = None,
    ) -> LossOutput:
        """Returns the unweighted error with every target at one noise level and clean contexts, nothing dropped.

        `per_chunk` [blocks] has every block of the clip as the target, the first one from its first latent; `loss` is
        the mean of the others.
        """
        frames, found = self.chunk_lat, []
        for target in range(self.chunks_used(latents.shape[2])):
            first = max(0, target - 1)
            span = slice(first * frames, (target + 1) * frames)
            named = NoiseKey(key.seed, tuple(f"{sample}/{target}" for sample in key.samples))
            training_pass = self.prepare(network, latents[:, :, span], named, sigma=sigma)
            told = of_chunks(conditions, range(first, target + 1))
            own_mask = None if mask is None else mask[:, :, span]
            found.append(self._loss(network, training_pass, told, own_mask).loss)
        per_chunk = torch.stack(found)
        return LossOutput(loss=per_chunk[1:].mean(), per_chunk=per_chunk)

    def _part(
        self, network: Network, slots: Tensor, conditions: Conditions, key: NoiseKey, mask: Tensor | None
    ) -> LossOutput:
        """Returns the loss of samples that have the same slots, [b s v f c h w]."""
        latents = rearrange(slots, "b n v f c h w -> b v (n f) c h w")
        return self._loss(network, self.prepare(network, latents, key), conditions, mask)

    def _context_levels(self, key: NoiseKey, chunks: list[int]) -> Tensor:
        is_noised = self.modes(key) == MODES.index("noised")
        return super()._context_levels(key, chunks) * is_noised[:, None, None, None]

    # Contexts

    @torch.no_grad()
    def _contexts(
        self,
        batch: _Batch,
        contexts: Tensor,
        pairs: Pairs,
        rows: Tensor,
        key: NoiseKey,
        transform: ContextTransform | None,
    ) -> Tensor:
        """Returns the contexts [b v f c h w] of some samples as their modes want them; noise is added later."""
        mode, result = pairs.mode[rows], contexts.clone()
        recoded = (mode == MODES.index("recoded")).nonzero()[:, 0].to(contexts.device)
        if len(recoded):
            assert transform is not None, "contexts that are recoded need a context_transform"
            result[recoded] = transform(contexts[recoded]).to(result.dtype)
        own = (mode == MODES.index("own")).nonzero()[:, 0]
        if len(own):
            result[own.to(contexts.device)] = self._own_blocks(batch, pairs, rows[own], key).to(result.dtype)
        return result

    def _own_blocks(self, batch: _Batch, pairs: Pairs, rows: Tensor, key: NoiseKey) -> Tensor:
        """Returns the last blocks [b v f c h w] of rollouts that begin at true blocks, as long as `pairs` says."""
        first, depth = pairs.first[rows], pairs.depth[rows]
        num_chunks = int(depth.max()) + 1
        blocks = (first[:, None] + torch.arange(num_chunks)).clamp(max=batch.blocks.shape[1] - 1)
        trained = TrainedFor(
            rollouts=self.rollouts, chunk_lat=self.chunk_lat, starts_lat=(), own_starts=True, one_context=True
        )
        plan = RolloutPlan(
            num_frames_px=trained.pixels(num_chunks * self.chunk_lat),
            num_chunks=num_chunks,
            start_lat=self.chunk_lat,
            skipped_px=0,
            trained=trained,
        )
        own_key = NoiseKey(key.seed, tuple(f"own {key.samples[row]}" for row in rows.tolist()))
        rollout = MemoryRollout(num_steps=self.own_steps, guidance=1.0)
        start = batch.blocks_of(rows, first[:, None])[:, 0]
        told = of_rows(batch.conditions, rows, blocks)
        chunks = list(rollout(batch.network, start, told, plan, self.own_solver, own_key))
        torch.clear_autocast_cache()  # weights that were cast without gradient must not serve the training pass
        made = torch.stack([chunk.latents for chunk in chunks], dim=1)
        return made[torch.arange(len(rows), device=made.device), depth.to(made.device)]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch as rollouts of the network take it.

    Attributes:
        network: that is trained.
        blocks: clean latents, [b n v f c h w].
        conditions: with the blocks as slot axis.
    """

    network: Network
    blocks: Tensor
    conditions: Conditions

    def blocks_of(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Returns some blocks [n s] of some samples [n], a copy, [n s v f c h w]."""
        return self.blocks[rows.to(self.blocks.device)[:, None], blocks.to(self.blocks.device)]


def _of_rows(key: NoiseKey, rows: Tensor) -> NoiseKey:
    return NoiseKey(key.seed, tuple(key.samples[row] for row in rows.tolist()))


def _mask_of(mask: Tensor, rows: Tensor, blocks: Tensor, frames: int) -> Tensor:
    """Returns the mask [b v t] of some blocks [n s] of some samples [n], [n v s*frames]."""
    by_block = rearrange(mask, "b v (n f) -> b n v f", f=frames)
    picked = by_block[rows.to(mask.device)[:, None], blocks.to(mask.device)]
    return rearrange(picked, "b n v f -> b v (n f)")


def _checked_weights(given: Mapping[str, float]) -> dict[str, float]:
    for name in given:
        if name not in MODES:
            raise unknown_choice("kind of context", name, MODES, "objective.context")
    weights = {name: float(value) for name, value in given.items()}
    if min(weights.values(), default=0.0) < 0 or sum(weights.values()) <= 0:
        raise ConfigError(
            f"objective.context is {weights}; expected weights of 0 or more, not all of them 0. Change "
            "`objective.context`."
        )
    return weights
