"""The basis of latents: reconstructions stay, variances are equal, directions count by what they do to the pixels."""

from __future__ import annotations

import copy

import pytest
import torch

from longtake.encoders.latent_basis import balanced_basis, change_basis, equalising_rotation, measured_basis
from longtake.encoders.video_vae import VideoVAENetwork


def _network(channels: int = 6) -> VideoVAENetwork:
    torch.manual_seed(0)
    network = VideoVAENetwork(channels, (8, 8, 8), (1, 1, 1), (8, 8, 8), (1, 1, 1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        network.decoder.linear.weight[:, 0] *= 8  # one channel does far more to the pixels than the others
    return network.eval()


def _clips() -> torch.Tensor:
    torch.manual_seed(1)
    coarse = torch.randn(4, 3, 3, 3, 4)
    return torch.nn.functional.interpolate(coarse, size=(9, 24, 32), mode="trilinear").movedim(1, 2).clamp(-1, 1)


@pytest.mark.parametrize("channels", [2, 5, 16])
def test_the_rotation_makes_all_variances_equal(channels: int) -> None:
    torch.manual_seed(channels)
    root = torch.randn(channels, channels, dtype=torch.float64) * torch.logspace(0, 3, channels, dtype=torch.float64)
    covariance = root @ root.T
    rotation = equalising_rotation(covariance)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(channels, dtype=torch.float64))
    variances = (rotation @ covariance @ rotation.T).diagonal()
    torch.testing.assert_close(variances, covariance.trace().div(channels).expand(channels), rtol=1e-9, atol=0)


def test_a_rotation_of_equal_variances_is_left_alone() -> None:
    covariance = torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(equalising_rotation(covariance), torch.eye(2, dtype=torch.float64))


def test_errors_cost_the_same_in_every_direction_of_the_basis() -> None:
    cost = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    basis = balanced_basis(torch.zeros(3), torch.eye(3), cost)
    inverse = torch.linalg.inv(basis.matrix)
    by_direction = inverse.T @ torch.diag(cost) @ inverse
    torch.testing.assert_close(by_direction, by_direction[0, 0] * torch.eye(3, dtype=torch.float64))


def test_reconstructions_stay_and_latents_are_normalised() -> None:
    network, clips = _network(), _clips()
    basis = measured_basis(network, clips)
    changed = copy.deepcopy(network)
    change_basis(changed, basis)
    with torch.no_grad():
        before, after = (one.decode(one.encode(clips))[0] for one in (network, changed))
        latents = changed.encode(clips)
    assert float((after - before).abs().max()) < 1e-4
    cells = ((latents - changed.mean[:, None, None]) / changed.std[:, None, None]).movedim(2, -1).flatten(0, -2)
    torch.testing.assert_close(cells.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(cells.std(0), torch.ones(6), rtol=0, atol=1e-3)
