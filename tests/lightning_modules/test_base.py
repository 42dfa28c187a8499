"""What every LightningModule has in common."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.base import built
from longtake.errors import ConfigError
from tests.tiny_module import TinyModule, fit


def module(width: int = 3) -> TinyModule:
    made = TinyModule(width=width)
    made.configure_model()
    return made


def test_weights_come_from_safetensors_and_from_checkpoints(tmp_path: Path) -> None:
    source = module()
    torch.nn.init.normal_(source.network[0].weight)  # type: ignore[index,arg-type]
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.ckpt")
    for name in ("w.safetensors", "w.ckpt"):
        target = TinyModule()
        target.initialise_from(tmp_path / name)
        for key, value in source.state_dict().items():
            assert torch.equal(value, target.state_dict()[key])


def test_weights_that_do_not_fit_name_the_first_difference(tmp_path: Path) -> None:
    save_file(module(width=3).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"\[3\] for 'network.0.bias', the model has \[8\]"):
        TinyModule(width=8).initialise_from(tmp_path / "w.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="holds nothing for|the model has nothing"):
        TinyModule().initialise_from(tmp_path / "w.safetensors")


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.ckpt").write_text("hello")
    (tmp_path / "w.safetensors").write_text("hello")
    for name in ("w.ckpt", "w.safetensors", "missing.ckpt"):
        with pytest.raises(ConfigError, match="init_from"):
            TinyModule().initialise_from(tmp_path / name)


def test_the_schedule_is_stepped_by_optimiser_steps() -> None:
    made = module().configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    assert made["optimizer"].param_groups[0]["lr"] == pytest.approx(0.05 / 4)  # a warm-up of 3 steps


def test_a_config_node_is_built_and_anything_else_stays() -> None:
    made = built({"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3})
    assert isinstance(made, torch.nn.Linear)
    assert built({"a": 1}) == {"a": 1}
    function = partial(int, "3")
    assert built(function) is function


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    clean, poisoned = TinyModule(), TinyModule()
    fit(clean, tmp_path / "clean", 3)
    fit(poisoned, tmp_path / "poisoned", 4, poisoned=(3,))
    assert poisoned.skipped_steps == 1
    for one, other in zip(clean.parameters(), poisoned.parameters(), strict=True):
        assert torch.equal(one, other)
