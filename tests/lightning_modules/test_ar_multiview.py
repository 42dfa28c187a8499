"""Several views with control video through the LightningModule: what the network is told, training, and rollouts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.ema import EMA
from lightning_modules.ar_diffusion import ARDiffusion
from longtake.errors import ConfigError
from longtake.types import Clip
from tests.random_clips import RandomClips
from tests.tiny_ar import ACTIONS, fit_tiny, make_data, make_module, nodes

RIG = {"views": {"front": {}, "left": {}, "right": {}}}
CONTROL = {
    "_target_": "longtake.networks.control.Control",
    "_partial_": True,
    "types": ["depth"],
    "into": [0, 1],
}
FRAME_CONDITIONED = {
    "_target_": "longtake.objectives.frame_conditioned.FrameConditioned",
    "noise_levels": {"_target_": "longtake.objectives.flow_matching.NoiseLevels"},
    "views": [1, 3],
    "control_dropout": 0.15,
}
WINDOWS = {
    "_target_": "longtake.rollout.sliding_window.SlidingWindowRollout",
    "num_steps": 3,
    "guidance": 1.0,
    "unconditional": ["actions"],
}


class ThreeViews(RandomClips):
    """Clips of three views with a control video each."""

    def on_before_batch_transfer(self, batch: Clip, dataloader_idx: int) -> Clip:
        return three_views(super().on_before_batch_transfer(batch, dataloader_idx))


def three_views(batch: Clip) -> Clip:
    assert batch.video is not None
    b = len(batch)
    video = torch.cat([batch.video, batch.video.flip(-1), 255 - batch.video], dim=1)
    return dataclasses.replace(
        batch,
        video=video,
        control={"depth": video.flip(-2)},
        control_mask={"depth": torch.ones(b, 3, dtype=torch.bool)},
        view_ids=torch.arange(3).expand(b, -1),
        view_mask=torch.ones(b, 3, dtype=torch.bool),
    )


def three_view_module(views: str = "ViewChannels", **changes: Any) -> ARDiffusion:
    network = nodes()["network"]
    network |= {
        "mixer": {"_target_": "longtake.networks.attention.FullAttention", "_partial_": True},
        "views": {"_target_": f"longtake.networks.views.{views}", "_partial_": True, "rig": RIG},
        "control": CONTROL,
        "given_channel": True,
    }
    parts = {"network": network, "rollout": WINDOWS, "num_context_frames": 1}
    return make_module(**parts, **changes)


@pytest.fixture(autouse=True)
def objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `make_module` take frame conditioning."""
    import tests.tiny_ar as tiny_ar

    plain = tiny_ar.nodes
    monkeypatch.setattr(tiny_ar, "nodes", lambda **changes: {**plain(), "objective": {**FRAME_CONDITIONED, **changes}})


def batch_of(count: int = 2) -> Clip:
    return three_views(make_data().batch(list(range(count))))


@pytest.mark.parametrize("views", ["ViewChannels", "CrossViews"])
def test_it_trains_on_three_views_with_control(views: str, tmp_path: Path) -> None:
    module = three_view_module(views)
    sizes = {"batch_size": 2, "height": 16, "width": 16, "num_frames": 21, "val_clips": 2, "limit_samples": None}
    data = ThreeViews(num_workers=0, action_dim=ACTIONS, seed=0, **sizes)
    trainer = fit_tiny(module, tmp_path, 4, EMA(decay=0.5), data=data)
    assert trainer.global_step == 4
    assert module.skipped_steps == 0
    branch = module.network.control.branches["depth"]
    assert branch.after[0].weight.abs().max() > 0
    assert branch.before.weight.abs().max() > 0


def test_the_network_is_told_views_and_control() -> None:
    module = three_view_module()
    module.configure_model()
    batch = batch_of()
    latents, told = module.encoded(batch)
    assert told.control is not None
    assert told.control_weight is not None
    assert told.view_mask is not None
    assert told.view_ids is not None
    assert told.control["depth"].shape == (2, 1, *latents.shape[1:])
    assert batch.control is not None
    control = module.video_encoder.encode(batch.control["depth"].float() / 127.5 - 1)
    assert torch.equal(told.control["depth"][:, 0], control)
    assert batch.control_mask is not None
    half = dataclasses.replace(batch, control_mask={"depth": torch.tensor([[True, False, True]] * 2)})
    weights = module.encoded(half)[1].control_weight
    assert weights is not None
    assert weights["depth"][0, 0, :, 0, 0, 0].tolist() == [1, 0, 1]


def test_a_network_without_a_branch_is_not_told_of_control() -> None:
    module = make_module(rollout=WINDOWS, num_context_frames=1)
    module.configure_model()
    assert module.encoded(batch_of())[1].control is None


def test_cached_control_is_taken_as_it_is() -> None:
    module = three_view_module()
    module.configure_model()
    batch = batch_of()
    latents, told = module.encoded(batch)
    assert told.control is not None
    control = {"depth": told.control["depth"][:, 0]}
    cached = dataclasses.replace(batch, video=None, latents=latents, control=control)
    again, same = module.encoded(cached)
    assert same.control is not None
    assert torch.equal(again, latents)
    assert torch.equal(same.control["depth"], told.control["depth"])


def test_a_rollout_shows_what_was_given_and_follows_control() -> None:
    module = three_view_module()
    module.configure_model()
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    module.network.eval()
    batch, plan = batch_of(), module.plan(21)
    assert plan.start_px == 1

    def rolled(clip: Clip) -> np.ndarray:
        return np.concatenate([chunk.frames for chunk in module.rollout_frames(clip, plan)], axis=2)

    frames = rolled(batch)
    truth = module.truth_frames(batch, plan)
    assert frames.shape == truth.shape
    assert np.array_equal(frames[:, :, 0], truth[:, :, 0])
    assert np.array_equal(frames, rolled(batch))
    assert batch.control is not None
    other = dataclasses.replace(batch, control={"depth": 255 - batch.control["depth"]})
    assert not np.array_equal(frames[:, :, 1:], rolled(other)[:, :, 1:])


def test_other_views_than_those_of_the_rig_are_refused() -> None:
    module = three_view_module()
    module.configure_model()
    module._data = {"view_names": ["front", "right", "left"]}
    with pytest.raises(ConfigError, match="front, right, left.*same in the same order"):
        module.on_fit_start()


def test_the_number_of_views_may_be_smaller_in_a_rollout() -> None:
    module = three_view_module()
    module.configure_model()
    module.network.eval()
    batch = batch_of()
    assert batch.video is not None
    assert batch.view_ids is not None
    assert batch.control is not None
    two = dataclasses.replace(
        batch,
        video=batch.video[:, 1:],
        control={"depth": batch.control["depth"][:, 1:]},
        control_mask=None,
        view_ids=batch.view_ids[:, 1:],
        view_mask=None,
    )
    frames = [chunk.frames for chunk in module.rollout_frames(two, module.plan(21))]
    assert frames[0].shape[:2] == (2, 2)
