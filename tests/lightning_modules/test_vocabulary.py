"""Weights that begin a new run on data whose captions have another vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.ema import EMA
from callbacks.weights_export import WeightsExport
from lightning_modules.ar_diffusion import ARDiffusion
from tests.random_clips import RandomClips
from tests.tiny_ar import ACTIONS, fit_tiny, make_data, make_module, nodes

WORDS = {"_target_": "longtake.encoders.text.WordsEncoder", "vocab_size": 8, "max_words": 4}
TABLE = {
    "_target_": "longtake.networks.conditioning.TextEmbedding",
    "_partial_": True,
    "text_dim": 4,
    "vocab_size": 8,
}


def captioned(*words: str) -> RandomClips:
    """Returns clips whose captions are to be read with these words."""
    names = [f"action_{column}" for column in range(ACTIONS)]
    data: Any = make_data()
    data.description = lambda: {"action_names": names, "text": {**WORDS, "words": list(words)}}
    return data


def reader_of_words(**changes: Any) -> ARDiffusion:
    parts = nodes()
    return make_module(
        network={**parts["network"], "text": TABLE}, encoder={**parts["encoder"], "text": WORDS}, **changes
    )


def table_of(network: Any) -> torch.Tensor:
    return network.text.words.weight


@pytest.mark.parametrize("name", ["weights.safetensors", "checkpoints/last.ckpt"])
def test_word_vectors_follow_their_words(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    trained = reader_of_words()
    export = WeightsExport(str(tmp_path / "weights.safetensors"))
    fit_tiny(trained, tmp_path, 1, export, data=captioned("wall", "a", "hall"))
    module = reader_of_words(lr=1e-30, seed=5)
    module.initialise_from(tmp_path / name)
    with caplog.at_level("INFO", "longtake"):
        fit_tiny(module, tmp_path / "next", 1, EMA(decay=0.5), data=captioned("a", "door", "wall"))
    wanted = table_of(trained.network)[[0, 1, 3, 1, 2]]  # padding, unknown, "a", "door" as unknown so far, "wall"
    assert torch.equal(table_of(module.network)[:5], wanted)
    assert torch.equal(table_of(module.ema_network)[:5], wanted)
    assert "2 word vectors follow their words; new, beginning as unknown words: door" in caplog.text
