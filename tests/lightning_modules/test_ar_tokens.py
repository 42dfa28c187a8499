"""The token module: losses, resume, what is exported, rollouts that are the training pass, what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.curriculum import Curriculum
from callbacks.ema import EMA
from callbacks.video_grid import VideoGrid
from callbacks.weights_export import WeightsExport
from lightning_modules.ar_tokens import ARTokens
from longtake.errors import ConfigError, DataError
from longtake.generate_tokens import TokenModel
from longtake.loading import load, load_spec
from longtake.media.read import probe_video
from longtake.objectives.next_token import predicted_hidden
from longtake.optimizers import MuonAdamW
from longtake.rollout.noise import NoiseKey
from longtake.rollout.sampling import Truncated
from longtake.rollout.tokens import TokenRollout
from longtake.types import Clip
from tests.random_clips import RandomClips
from tests.tiny_ar import Losses, fit_tiny
from tests.tiny_tokens import ACTIONS, FAST, VIDEO, make_tokens_data, make_tokens_module

NOISY = {"token_noise": 0.3, "action_dropout": 0.2, "z_loss": 1e-3}
SCHEDULES = [{"key": "objective.token_noise", "kind": "linear", "points": [[0, 0.0], [6, 0.3]]}]


class FastData(RandomClips):
    """Clips that a tokenizer of actions can be fitted on."""

    def training_actions(self) -> Iterator[np.ndarray]:
        actions = self.batch(list(range(40))).actions
        assert actions is not None
        yield from actions.numpy()


def clips(count: int = 3) -> Clip:
    return make_tokens_data().batch(list(range(count)))


def ready(**changes: Any) -> ARTokens:
    module = make_tokens_module(**changes)
    module.configure_model()
    return module


def trained(tmp_path: Path, steps: int = 12, **changes: Any) -> ARTokens:
    module = make_tokens_module(**changes)
    export = WeightsExport(str(tmp_path / "weights.safetensors"))
    fit_tiny(module, tmp_path, steps, EMA(decay=0.5), export, data=make_tokens_data())
    return module


def test_a_few_steps_lower_the_loss(tmp_path: Path) -> None:
    losses = Losses()
    fit_tiny(make_tokens_module(), tmp_path, 60, losses, data=make_tokens_data(limit_samples=2))
    assert sum(losses.values[:3]) / 3 > 0.8 * math.log(64)
    assert sum(losses.values[-10:]) < 0.5 * sum(losses.values[:10])


def test_cached_tokens_give_the_loss_of_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = ready(objective=NOISY), clips()
    monkeypatch.setattr(ARTokens, "log", lambda *args, **kwargs: None)
    cached = dataclasses.replace(batch, video=None, tokens=module.codes_of(batch))
    assert torch.equal(module.training_step(batch, 0), module.training_step(cached, 0))
    assert module.work(batch) == module.work(cached)
    assert module.work(batch).tokens == 3 * 3 * 2 * 2  # clips x latent frames x rows x columns


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
        data = make_tokens_data()
        data.__class__ = Batched
        data.size_of_batch = size  # type: ignore[attr-defined]
        module = make_tokens_module(objective={"context_lat": 1}, num_context_frames=9)
        trainer = fit_tiny(module, tmp_path, 2, data=data, limit_val_batches=None, val_check_interval=2)
        figures.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
    assert set(figures[0]) == {"val/loss", "val/nll", "val/nll@latent02", "val/accuracy", "val/bits_per_token"}
    assert figures[0]["val/bits_per_token"] == pytest.approx(figures[0]["val/nll"] / math.log(2), rel=1e-5)
    assert figures[0]["val/loss"] == pytest.approx(figures[0]["val/nll@latent02"], rel=1e-5)
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=1e-4)


def test_a_resumed_run_is_bit_identical_with_average_and_schedules(tmp_path: Path) -> None:
    def parts() -> tuple[Losses, EMA, Curriculum]:
        return Losses(), EMA(decay=0.8), Curriculum(SCHEDULES)

    whole, first, second = (make_tokens_module(objective=NOISY) for _ in range(3))
    losses, *rest = parts()
    fit_tiny(whole, tmp_path / "whole", 8, losses, *rest, data=make_tokens_data())
    before, *rest = parts()
    fit_tiny(first, tmp_path / "cut", 5, before, *rest, save_every=5, data=make_tokens_data())
    after, *rest = parts()
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    fit_tiny(second, tmp_path / "cut", 8, after, *rest, ckpt=last, data=make_tokens_data())
    assert before.values + after.values == losses.values
    assert second.ema_updates == whole.ema_updates == 8
    mine, wanted = second.state_dict(), whole.state_dict()
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    assert second.objective.token_noise == pytest.approx(0.3)


class Forced(TokenRollout):
    """Feeds the true tokens back, whatever was drawn."""

    def latents(self, window: Any) -> Iterator[int]:
        places = iter(range(window.given, window.tokens.shape[1]))
        self.distributions = lambda decoder, hidden: self.true(window.truth[:, next(places)])  # type: ignore[method-assign]
        return super().latents(window)

    def true(self, tokens: Tensor) -> Truncated:
        return Truncated(tokens[:, None], torch.ones(len(tokens), 1))


@pytest.mark.parametrize("views", [1, 2])
def test_the_training_pass_is_the_rollout(views: int) -> None:
    """The nats of the parallel pass are those of decoding token after token when the true ones are fed back."""
    module = ready().eval()
    batch = clips()
    assert batch.video is not None
    batch = dataclasses.replace(batch, video=torch.cat([batch.video.roll(view, 0) for view in range(views)], dim=1))
    tokens, told = module.encoded(batch)
    with torch.no_grad():
        hidden = predicted_hidden(module.network, tokens, told, 2)
        wanted = module.network.head.log_probs_of(hidden, tokens[:, :, 2:])
    frames = list(Forced()(module.network, tokens[:, :, :2], told, 3, NoiseKey(0, tuple("abc")), truth=tokens))
    assert torch.equal(frames[2].tokens, tokens[:, :, 2])
    assert frames[2].log_probs is not None
    assert (frames[2].log_probs - wanted[:, :, 0]).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["additive", "fast"])
def test_actions_change_the_logits(kind: str, tmp_path: Path) -> None:
    if kind == "fast":
        encoder = {"_target_": "longtake.encoders.actions.FastActionsEncoder", "vocab_size": 64}
        module = make_tokens_module(
            network={"actions": FAST, "cross_attn_every": 1},
            encoder={"video": {"_target_": "tests.block_tokens.BlockTokens"}, "actions": encoder},
        )
        data = make_tokens_data()
        data.__class__ = FastData
        fit_tiny(module, tmp_path, 3, data=data)
        assert module.encoder("actions").tokenizer is not None
        assert module.spec().encoder["actions"]["tokenizer"]
    else:
        module = ready()
    module.eval()
    batch = clips()
    assert batch.actions is not None
    other = dataclasses.replace(batch, actions=batch.actions.roll(1, 0))
    with torch.no_grad():
        logits = []
        for told in (batch, other):
            tokens, conditions = module.encoded(dataclasses.replace(told, video=batch.video))
            logits.append(module.network.head.logits(predicted_hidden(module.network, tokens, conditions, 2)))
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_without_action_dim_actions_are_ignored() -> None:
    module = ready(action_dim=None, network={"actions": None})
    assert module.encoded(clips())[1].actions is None


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else() -> None:
    module = ready()
    groups = module.param_groups()
    hidden = [p for group in groups if group.get("hidden") for p in group["params"]]
    linears = {n: m for n, m in module.network.named_modules() if isinstance(m, torch.nn.Linear)}
    wanted = {n: m.weight for n, m in linears.items() if n.startswith("layers.")}
    assert {id(p) for p in hidden} == {id(p) for p in wanted.values()}
    assert len(wanted) == 2 * 4
    assert sum(len(group["params"]) for group in groups) == len(list(module.network.parameters()))
    optimizer = MuonAdamW(groups, lr=1e-3)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups if group["params"][0].ndim < 2)


def test_what_is_exported_loads_and_continues_videos(tmp_path: Path) -> None:
    module = trained(tmp_path)
    model = load(tmp_path / "weights.safetensors", trust=["tests"])
    assert isinstance(model, TokenModel)
    spec = model.spec
    assert (spec.step, spec.is_average, spec.num_context_frames, spec.vocab_size) == (12, True, 9, 64)
    assert spec.grid_lat == [3, 2, 2]
    assert spec.trained_for.starts_lat == (2,)
    assert all(
        torch.equal(value, module.ema_network.state_dict()[n]) for n, value in model.network.state_dict().items()
    )
    batch = clips(1)
    assert batch.video is not None
    frames = batch.video[0].permute(0, 1, 3, 4, 2).numpy()
    video = model.generate(start=frames[:, :9], num_frames=30, actions=np.ones((30, ACTIONS), np.float32)).video()
    assert video.shape == (1, 1, 30, 16, 16, 3)
    assert np.array_equal(video[0, :, :9], frames[:, :9])


def test_a_checkpoint_is_the_model_too(tmp_path: Path) -> None:
    trained(tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert load_spec(last, ["tests"]).kind == "ar_tokens"
    one, two = (load(path, trust=["tests"]) for path in (last, tmp_path / "weights.safetensors"))
    state = two.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.network.state_dict().items())


@pytest.mark.parametrize("name", ["weights.safetensors", "checkpoints/last.ckpt"])
def test_post_training_starts_from_given_weights(tmp_path: Path, name: str) -> None:
    first = trained(tmp_path)
    module = make_tokens_module(seed=5)
    module.initialise_from(tmp_path / name)
    wanted = first.ema_network.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in module.network.state_dict().items())
    fit_tiny(module, tmp_path / "next", 1, EMA(decay=0.5), data=make_tokens_data())
    assert module.ema_updates == 1


def test_actions_are_added_to_weights_that_were_trained_without_any(tmp_path: Path) -> None:
    bare = trained(tmp_path, action_dim=None, network={"actions": None})
    module = make_tokens_module(seed=5, new_lr_scale=10.0)
    module.initialise_from(tmp_path / "weights.safetensors")
    given, mine = bare.ema_network.state_dict(), module.network.state_dict()
    assert {name.split(".")[0] for name in mine.keys() - given.keys()} == {"actions"}
    assert all(torch.equal(mine[name], given[name]) for name in given)
    rates = {group["initial_lr"] for group in module.configure_optimizers()["optimizer"].param_groups}
    assert sorted(rates) == pytest.approx([1e-2, 1e-1])


def test_released_weights_of_cosmos_are_taken(tmp_path: Path) -> None:
    from longtake.pretrained.cosmos_ar import from_longtake

    first = ready(action_dim=None, network={"actions": None})
    torch.save({"model": from_longtake(first.network.state_dict())}, tmp_path / "model.pt")
    second = make_tokens_module(seed=5, action_dim=None, network={"actions": None})
    second.initialise_from(tmp_path / "model.pt")
    wanted = first.network.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in second.network.state_dict().items())


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ConfigError, match=r"does not fit this network in .* tensors.*init_from"):
        make_tokens_module(network={"ffn_dim": 64}).initialise_from(tmp_path / "weights.safetensors")


def test_sample_videos_show_rollouts_beside_the_truth(tmp_path: Path) -> None:
    grid = VideoGrid(str(tmp_path / "samples"), every_n_steps=None, num_samples=2)
    fit_tiny(make_tokens_module(), tmp_path, 2, grid, data=make_tokens_data(), limit_val_batches=None)
    assert grid.last is not None
    assert probe_video(grid.last).num_frames == 17
    assert (grid.last.parent / "grid.png").is_file()


def test_tokens_without_a_tokenizer_are_trained_on_and_not_shown(tmp_path: Path) -> None:
    """1X tokens where the released tokenizer is not there: everything but pictures."""

    class Tokens(RandomClips):
        def batch(self, positions: list[int]) -> Clip:
            clip = super().batch(positions)
            tokens = ready().codes_of(clip)
            return dataclasses.replace(clip, video=None, tokens=tokens)

    data = make_tokens_data()
    data.__class__ = Tokens
    module = make_tokens_module(encoder={"video": None})
    grid = VideoGrid(str(tmp_path / "samples"), every_n_steps=1)
    fit_tiny(module, tmp_path, 2, grid, WeightsExport(str(tmp_path / "w.safetensors")), data=data)
    assert grid.last is None
    model = load(tmp_path / "w.safetensors", trust=["tests"])
    assert model.video_encoder is None
    with pytest.raises(ConfigError, match=r"without a video tokenizer.*encoder/video=cosmos"):
        model.generate(start=np.zeros((2, 2, 2), np.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"grid_lat": [3, 4, 4]}}, r"network\.grid_lat is \[3, 4, 4\].*have \[3, 2, 2\]"),
        ({"video": {**VIDEO, "num_frames": 25}}, r"network\.grid_lat is \[3, 2, 2\].*have \[4, 2, 2\]"),
        ({"video": {**VIDEO, "num_frames": 18}}, r"video\.num_frames is 18.*17 or 25"),
        ({"network": {"vocab_size": 640}}, "tokenizer has 64 tokens, the network is built for 640"),
        ({"objective": {"context_lat": 3}}, r"objective\.context_lat is 3"),
        ({"objective": {"context_lat": 0}}, "begin-of-video"),
        ({"num_context_frames": 1}, r"a start of 1 frames.*trained to start from 9 frames"),
        ({"rollout": {"_target_": "longtake.rollout.tokens.TokenRollout", "top_p": 1.5}}, r"rollout\.top_p is 1\.5"),
        ({"rollout": {"_target_": "longtake.rollout.chunks.MemoryRollout"}}, "rollout=memory"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_the_module_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, InstantiationException), match=message):
        make_tokens_module(**changes)


def test_tokens_outside_of_the_vocabulary_are_refused() -> None:
    module, batch = ready(), clips()
    tokens: Tensor = module.codes_of(batch).clone()
    tokens[0, 0, 0, 0, 0] = 64
    wrong, told = module.encoded(dataclasses.replace(batch, video=None, tokens=tokens))
    with pytest.raises(DataError, match="tokens range from .* to 64; expected 0 to 63"):
        predicted_hidden(module.network, wrong, told, 2)
