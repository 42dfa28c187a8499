"""What models that are rolled out have in common: frozen encoders, rollouts for validation, files."""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_modules.averaged import AveragedModule
from lightning_modules.base import built
from longtake.encoders.text import ids_in
from longtake.geometry import covering_latent_frames, pixel_frames
from longtake.model_spec import ModelSpec, without_folders
from longtake.optimizers import HIDDEN
from longtake.pretrained.weights_file import FORMAT, read_header
from longtake.provenance import commit
from longtake.rollout.noise import NoiseKey
from longtake.rollout.plan import TrainedFor
from longtake.rollout.sliding_plan import AnyPlan, plan_of
from longtake.streaming import VideoChunk, to_uint8
from longtake.types import Clip
from longtake.work import matmul_dtype

logger = logging.getLogger("longtake")
Node = Mapping[str, Any]


class GenerativeModule(AveragedModule):
    """A network that continues videos in the codes of a frozen encoder.

    The encoders are frozen and stand outside of the module: they are in no checkpoint and in no average.

    Args:
        network: config node of the network; it is built in `configure_model`.
        rollout: node of how the model is rolled out.
        encoder: nodes of the frozen encoders by name: "video", "text", "actions"; None or absent: none.
        video: geometry of the clips: fps, height, width, num_frames.
        action_dim: columns of actions that the data must have; None: actions are ignored.
        num_context_frames: pixel frames that rollouts are given by default; None: as suits the model.
        new_lr_scale: factor on the learning rate of what a pretrained network does not have.
        **kwargs: as for `AveragedModule`.

    Attributes:
        trained_for: what rollouts these weights are for.
    """

    trained_for: TrainedFor

    def __init__(
        self,
        *,
        network: Node,
        rollout: Node,
        encoder: Mapping[str, Node | None],
        video: Node,
        action_dim: int | None,
        num_context_frames: int | None,
        new_lr_scale: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(network=network, **kwargs)
        self.encoder_nodes: dict[str, Any] = {name: node for name, node in encoder.items() if node}
        self.rollout_node, self.rollout = rollout, built(rollout)
        self.video, self.action_dim, self.num_context_frames = dict(video), action_dim, num_context_frames
        self.new_lr_scale = new_lr_scale
        self._data: dict[str, Any] = {}
        self._words_before: list[str] | None = None  # of the weights that a new run begins with
        self._frozen: dict[str, Any] = {}  # a plain dict: Lightning and torch do not look inside

    @abstractmethod
    def codes_of(self, batch: Clip) -> Tensor:
        """Returns what the network works on, [b v t ...] in latent frames: cached, or encoded from pixels."""

    @abstractmethod
    def rollout_frames(self, batch: Clip, plan: Any, seed: int | None = None) -> Iterator[VideoChunk]:
        """Yields the frames of rollouts that start as the clips of a batch do, chunk by chunk.

        Args:
            batch: clips whose first frames are given, and whose actions and texts are told.
            plan: from `plan`.
            seed: of the noise; None: the run's.
        """

    @abstractmethod
    def spec(self) -> ModelSpec:
        """Returns what an exported file says of itself. Needs `setup` of the datamodule for the names of actions."""

    @property
    @abstractmethod
    def default_context_px(self) -> int:
        """Pixel frames that rollouts are given by default."""

    # Building

    def setup(self, stage: str) -> None:
        """Notes what the data is like; Lightning has set up the datamodule before."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "description"):
            self._data = data.description()
        else:
            self._data = {"action_names": [f"action_{column}" for column in range(self.action_dim or 0)]}
        text = self._data.pop("text", None)
        if text and "text" in self.encoder_nodes:  # the encoder that made the cached texts, with its vocabulary
            self.set_encoder("text", text)
            self._take_words(text.get("words"))
        config, run = self.run_config.get("data", {}), self.run_config.get("run", {})
        self._data["name"] = config.get("pixels") or run.get("data")
        if not self.action_dim:
            self._data["action_names"] = self._data["action_typical"] = []

    def initialise_from(self, path: str | Path) -> None:
        """As for `AveragedModule`; word vectors follow their words to the vocabulary of the data."""
        super().initialise_from(path)
        self._words_before = words_in(Path(path))

    def _take_words(self, words: list[str] | None) -> None:
        """Puts word vectors where the vocabulary of the data has their words; needs nothing if it is the same."""
        before, text = self._words_before, getattr(self.network, "text", None)
        self._words_before = None
        if text is None or text.words is None or not words or not before or words == before:
            return
        ids, new = ids_in(before, words)
        for network in (self.network, self.ema_network):
            if network is not None:
                network.text.take_words(ids)
        logger.info(
            "the data has another vocabulary than the weights: %d word vectors follow their words%s",
            len(words) - len(new),
            f"; new, beginning as unknown words: {', '.join(new)}" if new else "",
        )

    def set_encoder(self, name: str, node: Node) -> None:
        """Takes another encoder, such as one that was fitted on the data."""
        self.encoder_nodes[name] = node
        self._frozen.pop(name, None)

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns groups by three questions: is it pretrained or new, does it decay (vectors and scalars do not), and
        is it a matrix of a block (`hidden`, for optimisers that treat these in their own way)."""
        assert self.network is not None, "configure_model comes first"
        new = self.network.new_parameter_names() if self.new_lr_scale != 1 else set()
        hidden = self.network.hidden_matrix_names()
        groups: dict[tuple[bool, bool, bool], list[Tensor]] = {}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name in new, parameter.ndim > 1, name in hidden), []).append(parameter)
        return [
            {
                "params": params,
                **({"lr_scale": self.new_lr_scale} if is_new else {}),
                **({} if decays else {"weight_decay": 0.0}),
                **({HIDDEN: True} if is_hidden else {}),
            }
            for (is_new, decays, is_hidden), params in groups.items()
        ]

    # Encoders

    def encoder(self, name: str) -> Any:
        """Returns a frozen encoder, built at first use and on the module's device; None where there is none."""
        if name not in self.encoder_nodes:
            return None
        if name not in self._frozen:
            self._frozen[name] = built(self.encoder_nodes[name])
        encoder = self._frozen[name]
        return encoder.to(self.device) if hasattr(encoder, "to") else encoder

    @property
    def video_encoder(self) -> Any:
        """The frozen encoder of pixels."""
        return self.encoder("video")

    @property
    def text_encoder(self) -> Any:
        """The frozen encoder of captions, or None."""
        return self.encoder("text")

    @property
    def ratio(self) -> int:
        """Pixel frames a latent frame."""
        return self.video_encoder.geometry.ratio_time

    def with_text(self, batch: Clip) -> Clip:
        """Returns the batch with encoded texts, where the network takes any: cached ones, or those of its captions."""
        if self.text_encoder is None:
            return dataclasses.replace(batch, text_ids=None, text_emb=None, text_mask=None)
        if batch.text_ids is not None or batch.text_emb is not None:
            return batch
        fields = self.text_encoder(batch.captions or [""] * len(batch))
        return dataclasses.replace(batch, **{name: value.to(self.device) for name, value in fields.items()})

    def latent_mask(self, batch: Clip, num_lat: int) -> Tensor | None:
        """Returns which of the latents are real, bool [b v t]: those whose pixel frames all are. None: all are."""
        if batch.frame_mask is None and batch.view_mask is None:
            return None
        views = views_of(batch)
        if batch.frame_mask is None:
            real = torch.ones(len(batch), 1, num_lat, dtype=torch.bool, device=self.device)
        else:
            real = _real_latents(batch.frame_mask, self.ratio, self.trained_for.block_lat)[:, None]
        real = real.expand(-1, views, -1)
        return real if batch.view_mask is None else real & batch.view_mask[:, :, None]

    # Rollouts

    @property
    def can_show(self) -> bool:
        """Whether codes can be decoded to frames."""
        return self.video_encoder is not None

    def plan(self, num_frames_px: int, context_px: int | None = None) -> Any:
        """Returns the plan of a rollout, `RolloutPlan` or `SlidingPlan`.

        Without `context_px` it is that of one that starts as rollouts do by default.
        """
        given = self.default_context_px if context_px is None else context_px
        return plan_of(self.rollout, num_frames_px=num_frames_px, context_px=given, trained=self.trained_for)

    def noise_key(self, batch: Clip, seed: int | None) -> NoiseKey:
        """Returns the key of the noise of rollouts: the clips' names."""
        return NoiseKey(self.seed if seed is None else seed, tuple(batch.key))

    @torch.no_grad()
    def truth_frames(self, batch: Clip, plan: AnyPlan) -> np.ndarray:
        """Returns the true frames of a rollout, uint8 [b v t h w c]: pixels, or what cached codes decode to."""
        if batch.video is not None:
            return to_uint8(batch.video[:, :, : plan.num_frames_px].float() / 127.5 - 1)
        block_lat = plan.trained.block_lat
        count = covering_latent_frames(plan.num_frames_px, self.ratio, block_lat)
        codes = self.codes_of(batch)[:, :, :count].to(self.device)
        video = self.video_encoder.decode_blocks(codes, block_lat) if block_lat else self.video_encoder.decode(codes)
        return to_uint8(video[:, :, : plan.num_frames_px])

    # Files

    def spec_fields(self) -> dict[str, Any]:
        """Returns the fields that every kind of `ModelSpec` has, but for `video`."""
        return {
            "network": dict(self.network_node),
            "encoder": {"text": None, **{name: portable(node) for name, node in self.encoder_nodes.items()}},
            "rollout": dict(self.rollout_node),
            "trained_for": self.trained_for,
            "encoder_fingerprint": self.encoder_fingerprint,
            "num_context_frames": self.default_context_px,
            "data": self._data,
            "precision": str(matmul_dtype(str(self.trainer.precision))).removeprefix("torch."),
            "seed": self.seed,
            "step": self.global_step,
            "is_average": self.exports_average,
            "commit": commit(),
        }

    @property
    def encoder_fingerprint(self) -> str | None:
        """Names what made the codes, where it is known."""
        return self.video_encoder.fingerprint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["spec"] = self.spec().to_dict()  # so that a checkpoint can be rolled out as it is


def words_in(path: Path) -> list[str] | None:
    """Returns the vocabulary that a weights file or a checkpoint was trained with; None where there is none."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            is_ours = (file.metadata() or {}).get("format") == FORMAT
        spec = read_header(path, "init_from") if is_ours else {}
    else:
        spec = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("spec", {})
    return ((spec.get("encoder") or {}).get("text") or {}).get("words")


def portable(node: Node) -> dict[str, Any]:
    """Returns a config node without folders; what a fitted tokenizer holds stays, slashes and all."""
    inside = {name: value for name, value in node.items() if name == "tokenizer"}
    return {**without_folders(node), **inside}


def views_of(batch: Clip) -> int:
    """Returns the number of views of a batch."""
    clips = next(value for value in (batch.latents, batch.tokens, batch.video) if value is not None)
    return clips.shape[1]


def _real_latents(frame_mask: Tensor, ratio: int, block_lat: int | None) -> Tensor:
    """Returns which latent frames code real pixel frames only, bool [b t], from which pixel frames are, bool [b t]."""
    if block_lat is not None:
        blocks = frame_mask.unflatten(1, (-1, pixel_frames(block_lat, ratio)))
        return torch.cat([_real_latents(block, ratio, None) for block in blocks.unbind(1)], dim=1)
    grouped = frame_mask[:, 1:].unflatten(1, (-1, ratio)).all(2)
    return torch.cat([frame_mask[:, :1], grouped], dim=1)


def position_of(batch: Clip) -> Tensor:
    """Returns the plan positions of a training batch."""
    assert batch.position is not None, "a training batch knows its plan positions"
    return batch.position
