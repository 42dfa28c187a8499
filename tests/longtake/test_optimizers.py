"""MuonAdamW: who updates what, schedules, state that survives a checkpoint, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from longtake.errors import ConfigError
from longtake.optimizers import MuonAdamW


def _groups(network: nn.Module) -> list[dict[str, object]]:
    hidden = [p for p in network.parameters() if p.ndim == 2]
    return [
        {"params": hidden, "hidden": True},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def _train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


def test_equals_muon_and_adamw_side_by_side() -> None:
    ours, theirs = _network(), _network()
    optimizer = MuonAdamW(_groups(ours), lr=0.02, adamw_lr_scale=0.5, weight_decay=0.1)
    matrices, vectors = _groups(theirs)
    muon = torch.optim.Muon(matrices["params"], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(vectors["params"], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    _train(ours, optimizer, range(4))
    for step in range(4):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        theirs.zero_grad()
        theirs(x).square().mean().backward()
        muon.step()
        adamw.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_schedule_moves_both_rates() -> None:
    network = _network()
    optimizer = MuonAdamW(_groups(network), lr=0.02, adamw_lr_scale=0.25)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    _train(network, optimizer, range(1))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0025]
    frozen = copy.deepcopy(network.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _train(network, optimizer, range(1))
    assert all(torch.equal(frozen[name], value) for name, value in network.state_dict().items())


def test_resuming_equals_no_interruption() -> None:
    whole, stopped = _network(), _network()
    _train(whole, MuonAdamW(_groups(whole)), range(6))
    first = MuonAdamW(_groups(stopped))
    _train(stopped, first, range(3))
    state = copy.deepcopy(first.state_dict())
    second = MuonAdamW(_groups(stopped))
    second.load_state_dict(state)
    _train(stopped, second, range(3, 6))
    for one, other in zip(whole.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other)


def test_learns() -> None:
    network = _network()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(9))
    wanted = torch.sin(x[:, :4])
    optimizer = MuonAdamW(_groups(network), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (network(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_a_model_without_hidden_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match="no hidden matrices"):
        MuonAdamW([{"params": list(_network().parameters())}])


@pytest.mark.parametrize("values", [{"lr": 0.0}, {"adamw_lr_scale": -1.0}])
def test_rates_must_be_positive(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.{next(iter(values))}"):
        MuonAdamW(_groups(_network()), **values)
