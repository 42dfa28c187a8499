"""Trains a video tokenizer: clips of pixels -> tokens of a codebook -> the same clips."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.video_tokenizer import Coded, VideoTokenizer
from longtake.encoders.cosmos_layers import Past
from longtake.encoders.cosmos_tokenizer import KIND
from longtake.types import Clip

logger = logging.getLogger("longtake")


class DiscreteTokenizer(VideoTokenizer):
    """A first stage with finite scalar quantisation: gradients pass the rounding.

    A weak pull keeps each channel of the quantiser's input at mean 0 and variance 1. Without it the encoder drives them
    into the outermost levels, where the gradient of tanh is gone, and a hundred tokens do the work of 64,000.

    Validation also says how many tokens are in use: `val/token_perplexity`, 2 to the entropy in bits of the tokens that
    occur, which a codebook used evenly would bring to its size, or to the number of tokens validated if that is less.

    Args:
        variance_pull: weight of (mean square of a channel - 1)^2 + (mean of it)^2.
        **kwargs: as for `VideoTokenizer`; the network is a `CosmosNetwork`.
    """

    kind = KIND

    def __init__(self, *, variance_pull: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.variance_pull = variance_pull
        self.val_usage: TokenPerplexity | None = None

    def configure_model(self) -> None:
        super().configure_model()
        if self.val_usage is None:
            self.val_usage = TokenPerplexity(self.network.quantizer.vocab_size)

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns two groups: matrices and vectors (without decay)."""
        assert self.network is not None, "configure_model comes first"
        groups: dict[bool, list[Tensor]] = {}
        for parameter in self.network.parameters():
            groups.setdefault(parameter.ndim > 1, []).append(parameter)
        return [{"params": params, **({} if decays else {"weight_decay": 0.0})} for decays, params in groups.items()]

    def begin(self) -> None:
        """Begins the quantiser's matrix with principal components of what the encoder makes of training clips."""
        mean, covariance, count = self.moments(
            lambda video: self.network.latents(video, Past(keeps=False)).flatten(0, 3), self.principal_clips
        )
        self.network.begin_codes(mean, covariance)
        logger.info("the quantiser begins with principal components of %s latents", f"{count:,}")

    def code(self, video: Tensor, batch: Clip) -> Coded:
        z = self.network.features(video, Past(keeps=False))
        codes = self.network.quantizer(z)
        numbers = z.float().flatten(0, 3)
        pull = (numbers.square().mean(0) - 1).square().mean() + numbers.mean(0).square().mean()
        at_edge = (codes.detach().abs() == 1).float().mean()  # near 1 the encoder no longer gets a gradient
        recon = self.network.frames(codes, Past(keeps=False))
        return Coded(recon, self.variance_pull * pull, {"codes_at_edge": at_edge, "variance_pull": pull})

    def reconstruct(self, video: Tensor) -> Tensor:
        network = self.eval_network
        codes = network.quantizer(network.features(video, Past(keeps=False)))
        assert self.val_usage is not None, "configure_model comes first"
        self.val_usage.update(network.quantizer.tokens(codes))
        self.log("val/token_perplexity", self.val_usage, on_epoch=True, batch_size=len(video))
        return network.frames(codes, Past(keeps=False))


class TokenPerplexity(Metric):
    """2 to the entropy in bits of the tokens seen, over all ranks.

    Args:
        vocab_size: tokens there are.
    """

    counts: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(vocab_size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, tokens: Tensor) -> None:
        """Counts tokens of any shape."""
        self.counts += torch.bincount(tokens.flatten(), minlength=len(self.counts))

    def compute(self) -> Tensor:
        """Returns the perplexity."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        return torch.special.entr(share).sum().exp().float()
