"""What every LightningModule has in common."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.next_frame import NextFrame, _per_clip
from longtake.errors import ConfigError
from longtake.schedules import warmup_constant
from longtake.types import Clip


def module(width: int = 4, action_dim: int | None = 2) -> NextFrame:
    adam = partial(torch.optim.AdamW, lr=0.1)
    warmup = partial(warmup_constant, warmup_steps=1)
    return NextFrame(width=width, action_dim=action_dim, pairs_per_clip=3, optimizer=adam, scheduler=warmup)


def test_weights_come_from_safetensors_and_from_checkpoints(tmp_path: Path) -> None:
    source = module()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.ckpt")
    for name in ("w.safetensors", "w.ckpt"):
        target = module()
        target.initialise_from(tmp_path / name)
        for key, value in source.state_dict().items():
            assert torch.equal(value, target.state_dict()[key])


def test_weights_that_do_not_fit_name_the_first_difference(tmp_path: Path) -> None:
    save_file(module(width=4).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"\[4\] for 'first.bias', the model has \[8\]"):
        module(width=8).initialise_from(tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="nothing for|the model has nothing"):
        module(action_dim=None).initialise_from(tmp_path / "w.safetensors")


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.ckpt").write_text("hello")
    (tmp_path / "w.safetensors").write_text("hello")
    for name in ("w.ckpt", "w.safetensors", "missing.ckpt"):
        with pytest.raises(ConfigError, match="init_from"):
            module().initialise_from(tmp_path / name)


def test_the_schedule_is_stepped_by_optimiser_steps() -> None:
    made = module().configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    assert made["optimizer"].param_groups[0]["lr"] == pytest.approx(0.05)


def test_the_data_is_told_what_the_model_needs() -> None:
    assert module(action_dim=5).data_requirements() == {"action_dim": 5}


def test_the_untrained_stand_in_repeats_the_frame() -> None:
    frames = torch.rand(2, 3, 8, 8)
    net = module()
    torch.nn.init.zeros_(net.last.bias)
    assert torch.equal(net(frames, torch.rand(2, 2)), frames)


def test_the_loss_of_a_clip_leaves_out_padding() -> None:
    truth = torch.zeros(2, 1, 3, 3, 2, 2)
    pred = truth.clone()
    pred[0, 0, 0] = 1.0  # an error of 1 in one of the two real frames
    pred[0, 0, 2] = 9.0  # and a large one in a padded frame
    pred[1] = 9.0  # a clip that only fills up the batch
    weights = torch.tensor([[[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]])
    losses, is_real = _per_clip(pred, truth, weights)
    assert losses.tolist() == [0.5, 0.0]
    assert is_real.tolist() == [1.0, 0.0]


def test_frames_to_predict_from_are_spread_and_follow_the_plan() -> None:
    clip = Clip(video=torch.zeros(1, 1, 10, 3, 2, 2, dtype=torch.uint8), position=torch.tensor([7]))
    assert module()._starts(clip).tolist() == [1, 4, 7]  # nine pairs, every third, from 7 mod 3
    short = Clip(video=torch.zeros(1, 1, 3, 3, 2, 2, dtype=torch.uint8), position=torch.tensor([7]))
    assert module()._starts(short).tolist() == [0, 1]
