"""A tiny trained model in a run folder, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from callbacks.ema import EMA
from callbacks.weights_export import WeightsExport
from tests.tiny_ar import fit_tiny, make_module


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with weights.safetensors and checkpoints/last.ckpt."""
    folder = tmp_path_factory.mktemp("run")
    fit_tiny(make_module(lr=0.05), folder, 12, EMA(decay=0.5), WeightsExport(str(folder / "weights.safetensors")))
    return folder
