"""The AR diffusion module: losses, resume, groups of parameters, what is exported, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.curriculum import Curriculum
from callbacks.ema import EMA
from callbacks.weights_export import WeightsExport
from lightning_modules.ar_diffusion import ARDiffusion
from longtake.errors import ConfigError, DataError
from longtake.loading import load
from longtake.types import Clip
from tests.random_clips import RandomClips
from tests.tiny_ar import VIDEO, Losses, fit_tiny, make_data, make_module, nodes

CURRICULUM = [
    {"key": "objective.num_chunks", "points": [[0, 1], [3, 2]]},
    {"key": "objective.context_noise", "kind": "linear", "points": [[0, 0.0], [6, 0.3]]},
    {"key": "optimizer.lr", "kind": "linear", "points": [[0, 1e-2], [8, 1e-3]]},
]


def clips(count: int = 3, **changes: Any) -> Clip:
    return make_data(**changes).batch(list(range(count)))


def ready(**changes: Any) -> ARDiffusion:
    module = make_module(**changes)
    module.configure_model()
    return module


def test_a_few_steps_lower_the_loss(tmp_path: Path) -> None:
    losses = Losses()
    fit_tiny(make_module(), tmp_path, 60, losses, data=make_data(limit_samples=2))
    assert sum(losses.values[-10:]) < 0.75 * sum(losses.values[:10])


def test_cached_latents_give_the_loss_of_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = ready(), clips()
    monkeypatch.setattr(ARDiffusion, "log", lambda *args, **kwargs: None)
    cached = dataclasses.replace(batch, video=None, latents=module.codes_of(batch))
    assert torch.equal(module.training_step(batch, 0), module.training_step(cached, 0))
    assert module.work(batch) == module.work(cached)
    assert module.work(batch).tokens == 3 * 3 * 3 * 2 * 2  # clips x (t0, c0, t1) x latent frames x blocks


def test_contexts_that_are_drawn_again_are_work_too() -> None:
    """Two evaluations of chunk 0 alone, t0, beside the training pass over t0, c0, t1, which counts three times."""
    plain, own = (ready(objective={"own_contexts": share, "own_steps": 2}).work(clips()) for share in (0.0, 0.5))
    assert own.tokens == plain.tokens
    assert plain.flops * (1 + 2 / 9 * 0.7) < own.flops < plain.flops * (1 + 2 / 9)  # t0 alone attends to less


def test_the_loss_does_not_look_at_frames_that_are_not_real(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = ready(objective={"num_chunks": 1}), clips()
    monkeypatch.setattr(ARDiffusion, "log", lambda *args, **kwargs: None)
    assert batch.frame_mask is not None
    assert batch.video is not None
    mask = batch.frame_mask.clone()
    mask[:, 7:] = False  # pixel 8 ends latent frame 2
    masked = dataclasses.replace(batch, frame_mask=mask)
    changed = dataclasses.replace(masked, video=batch.video.clone())
    changed.video[:, :, 5:] = 0  # type: ignore[index]
    inside = ready(objective={"num_chunks": 1}).latent_mask(masked, 6)
    assert inside is not None
    assert inside[0, 0].tolist() == [True, True, False, False, False, False]
    assert not torch.equal(module.training_step(masked, 0), module.training_step(batch, 0))


def test_validation_does_not_depend_on_the_batch_or_on_filling(tmp_path: Path) -> None:
    class Batched(RandomClips):
        size_of_batch = 1

        def val_dataloader(self) -> DataLoader:
            rows = [10_000, 10_001, 10_002, -1] if self.size_of_batch == 2 else [10_000, 10_001, 10_002]
            return DataLoader(rows, batch_size=self.size_of_batch, collate_fn=self.filled)  # type: ignore[arg-type]

        def filled(self, rows: list[int]) -> Clip:
            clip = self.batch([max(row, 0) for row in rows])
            assert clip.frame_mask is not None
            return dataclasses.replace(clip, frame_mask=clip.frame_mask & (torch.tensor(rows) >= 0)[:, None])

    figures = []
    for size in (1, 2, 3):
        data = make_data()
        data.__class__ = Batched
        data.size_of_batch = size  # type: ignore[attr-defined]
        trainer = fit_tiny(make_module(), tmp_path, 2, data=data, limit_val_batches=None, val_check_interval=2)
        figures.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
    assert set(figures[0]) == {"val/loss", "val/loss@chunk00", "val/loss@chunk01"}
    assert figures[0]["val/loss"] == pytest.approx(
        (figures[0]["val/loss@chunk00"] + figures[0]["val/loss@chunk01"]) / 2, rel=1e-5
    )
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=1e-5)


def test_a_resumed_run_is_bit_identical_with_average_and_schedules(tmp_path: Path) -> None:
    def parts() -> tuple[Losses, EMA, Curriculum]:
        return Losses(), EMA(decay=0.8), Curriculum(CURRICULUM)

    whole, first, second = make_module(), make_module(), make_module()
    losses, *rest = parts()
    fit_tiny(whole, tmp_path / "whole", 8, losses, *rest)
    before, *rest = parts()
    fit_tiny(first, tmp_path / "cut", 5, before, *rest, save_every=5)
    after, *rest = parts()
    fit_tiny(second, tmp_path / "cut", 8, after, *rest, ckpt=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert before.values + after.values == losses.values
    assert second.ema_updates == whole.ema_updates == 8
    mine, wanted = second.state_dict(), whole.state_dict()
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    assert second.objective.num_chunks == 2  # type: ignore[attr-defined]
    assert second.objective.context_noise == pytest.approx(0.3)


def test_validation_keeps_all_chunks_whatever_the_schedule_says(tmp_path: Path) -> None:
    schedule = Curriculum([{"key": "objective.num_chunks", "points": [[0, 1]]}])
    trainer = fit_tiny(make_module(), tmp_path, 2, schedule, limit_val_batches=None, val_check_interval=2)
    assert float(trainer.callback_metrics["val/loss@chunk01"]) > 0


def test_encoders_are_in_no_checkpoint_and_are_not_trained(tmp_path: Path) -> None:
    module = make_module()
    fit_tiny(module, tmp_path, 1, EMA())
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in content["state_dict"]} == {"network", "ema_network"}
    assert content["ema_updates"] == 1
    assert content["spec"]["kind"] == "ar_diffusion"
    assert all("encoder" not in name for name, _ in module.named_modules())


def test_weights_do_not_depend_on_what_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = ready().state_dict()
    torch.rand(17)
    second, other = ready().state_dict(), ready(seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_groups_decay_matrices_only_and_scale_what_is_new() -> None:
    module = ready(new_lr_scale=10.0)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert module.network is not None
    names = {id(parameter): name for name, parameter in module.network.named_parameters()}
    new = module.network.new_parameter_names()  # type: ignore[operator]
    counted = 0
    for group in groups:
        for parameter in group["params"]:
            counted += 1
            assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0), names[id(parameter)]
            wanted = 10.0 if names[id(parameter)] in new else 1.0
            assert group["initial_lr"] == pytest.approx(1e-2 * wanted), names[id(parameter)]
    assert counted == len(names)
    assert len(groups) == 5
    assert len(ready().param_groups()) == 3


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else() -> None:
    module = ready()
    hidden = [p for group in module.param_groups() if group.get("hidden") for p in group["params"]]
    assert module.network is not None
    linears = {n: m for n, m in module.network.named_modules() if isinstance(m, torch.nn.Linear)}
    wanted = {n: m.weight for n, m in linears.items() if n.startswith("blocks.") and ".mixer." not in n}
    assert {id(p) for p in hidden} == {id(p) for p in wanted.values()}
    assert wanted


def test_attention_only_trains_nothing_else(tmp_path: Path) -> None:
    module = make_module(attn_only=True)
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.nn.init.normal_(module.network.head.head.weight)  # type: ignore[union-attr,arg-type]
    fit_tiny(module, tmp_path, 3)
    after = module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])} - {"network.head.head.weight"}
    assert moved
    assert all(".self_attn." in name for name in moved), moved


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Poisoned(ARDiffusion):
        def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 2 else loss

    parts = {"ema": EMA()}
    module = make_module()
    module.__class__ = Poisoned
    kept: list[dict[str, Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            kept.append({name: value.clone() for name, value in pl_module.network.state_dict().items()})  # type: ignore

    fit_tiny(module, tmp_path, 5, parts["ema"], Keep())
    assert module.skipped_steps == 1
    assert all(torch.equal(kept[1][name], kept[2][name]) for name in kept[1])
    assert any(not torch.equal(kept[2][name], kept[3][name]) for name in kept[2])
    lines = [record.message for record in caplog.records if "is skipped" in record.message]
    assert len(lines) == 1
    assert "step 2" in lines[0]
    assert "clip-4, clip-5" in lines[0]
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_divergence_ends_the_run(tmp_path: Path) -> None:
    class Diverged(ARDiffusion):
        def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("inf")

    module = make_module()
    module.__class__ = Diverged
    with pytest.raises(DataError, match=r"20 steps in a row.*optimizer\.lr"):
        fit_tiny(module, tmp_path, 30)


def test_what_is_exported_is_the_average_of_the_best_step(tmp_path: Path) -> None:
    module = make_module()
    export = WeightsExport(str(tmp_path / "weights.safetensors"))
    fit_tiny(module, tmp_path, 4, EMA(decay=0.5), export, limit_val_batches=None, val_check_interval=2)
    model = load(tmp_path, trust=["tests"])
    assert model.spec.step in (2, 4)
    assert model.spec.is_average
    if model.spec.step == 4:
        assert module.ema_network is not None
        wanted = module.ema_network.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in model.network.state_dict().items())


def test_without_validation_the_last_weights_are_exported_and_without_average_they_are_the_raw_ones(
    tmp_path: Path,
) -> None:
    module = make_module()
    fit_tiny(module, tmp_path, 3, WeightsExport(str(tmp_path / "w.safetensors"), dtype="bfloat16"))
    model = load(tmp_path / "w.safetensors", trust=["tests"])
    assert model.spec.step == 3
    assert not model.spec.is_average
    assert module.network is not None
    for name, value in module.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value.bfloat16().float())


@pytest.mark.parametrize("name", ["weights.safetensors", "checkpoints/last.ckpt"])
def test_a_new_run_can_start_from_exported_weights_and_checkpoints(tmp_path: Path, name: str) -> None:
    trained = make_module()
    fit_tiny(trained, tmp_path, 3, EMA(decay=0.5), WeightsExport(str(tmp_path / "weights.safetensors")))
    module = make_module(seed=5)
    module.initialise_from(tmp_path / name)
    assert trained.ema_network is not None
    assert module.network is not None
    wanted = trained.ema_network.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in module.network.state_dict().items())
    fit_tiny(module, tmp_path / "next", 1, EMA(decay=0.5))
    assert module.ema_updates == 1


def test_own_weights_of_a_simpler_network_leave_what_is_new_as_it_begins(tmp_path: Path) -> None:
    """A window first, LaCT on top of it later: the file has our names, and nothing for the fast weights."""
    from safetensors.torch import save_file

    window = {"_target_": "longtake.networks.attention.WindowAttention", "_partial_": True, "window": 1}
    simple, module = make_module(network={**nodes()["network"], "mixer": window}), make_module(seed=5)
    for each in (simple, module):
        each.configure_model()
    given = simple.network.state_dict()
    fresh = {name: value.clone() for name, value in module.network.state_dict().items()}
    save_file(given, tmp_path / "w.safetensors")
    module.initialise_from(tmp_path / "w.safetensors")
    for name, value in module.network.state_dict().items():
        assert torch.equal(value, given.get(name, fresh[name]))
    assert "blocks.0.self_attn.mixer.w0" not in given


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {name.removeprefix("network."): value for name, value in ready().state_dict().items()}
    state["blocks.0.ffn.0.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"\[3, 3\] for 'blocks\.0\.ffn\.0\.weight', the network has \[32, 16\]"):
        make_module().initialise_from(tmp_path / "w.safetensors")


def test_settings_that_cannot_work_are_refused_when_the_module_is_made() -> None:
    with pytest.raises(ConfigError, match="whole chunks"):
        make_module(video={**VIDEO, "num_frames": 17})
    with pytest.raises(ConfigError, match="rollout=one_shot"):
        make_module(rollout={"_target_": "longtake.rollout.one_shot.OneShotRollout", "num_steps": 2})
    with pytest.raises(ConfigError, match=r"rollout\.num_steps"):
        make_module(rollout={"_target_": "longtake.rollout.chunks.MemoryRollout", "num_steps": 0})
    with pytest.raises(ConfigError, match="num_context_frames"):
        make_module(num_context_frames=4)
    with pytest.raises(ConfigError, match="a start of 5 frames"):
        make_module(num_context_frames=5, objective={"first_chunk_clean": {"none": 1.0}})
