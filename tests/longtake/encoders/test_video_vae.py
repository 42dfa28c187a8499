"""Our first stage: geometry, causality, streaming, fingerprint, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.encoders.shipped import SHIPPED
from longtake.encoders.video_vae import VideoVAE, VideoVAENetwork
from longtake.errors import ConfigError
from longtake.pretrained.weights_file import write_weights
from tests.first_stage import NODE, random_network, random_video, random_weights


@pytest.fixture
def encoder(tmp_path: Path) -> VideoVAE:
    return VideoVAE(random_weights(tmp_path))


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (17, 5)])
def test_one_and_4k_frames_are_one_and_k_latents(encoder: VideoVAE, frames: int, latents: int) -> None:
    video = random_video(frames, b=2, v=3)
    coded = encoder.encode(video)
    assert coded.shape == (2, 3, latents, 4, 2, 3)
    assert coded.dtype == torch.float32
    decoded = encoder.decode(coded)
    assert decoded.shape == video.shape
    assert decoded.abs().max() <= 1


def test_wrong_lengths_and_sizes_name_the_nearest_legal_ones(encoder: VideoVAE) -> None:
    with pytest.raises(ConfigError, match=r"is 8; expected 1 \+ k\*4 frames, for example 5 or 9"):
        encoder.encode(random_video(8))
    with pytest.raises(ConfigError, match=r"video.width is 20; expected a multiple of 8, for example 16 or 24"):
        encoder.encode(random_video(5, width=20))
    with pytest.raises(ConfigError, match="3 channels, this encoder has 4"):
        encoder.decode(torch.zeros(1, 1, 2, 3, 2, 3))


def test_latents_of_a_prefix_are_a_prefix_of_the_latents(encoder: VideoVAE) -> None:
    video = random_video(17)
    whole = encoder.encode(video)
    for frames in (1, 5, 13):
        prefix = encoder.encode(video[:, :, :frames])
        torch.testing.assert_close(prefix, whole[:, :, : prefix.shape[2]], rtol=0, atol=1e-5)


def test_frames_do_not_depend_on_later_latents_but_on_earlier_ones(encoder: VideoVAE) -> None:
    latents = torch.randn(1, 1, 5, 4, 2, 3)
    changed = latents.clone()
    changed[:, :, 3] += 1
    before, after = encoder.decode(latents), encoder.decode(changed)
    torch.testing.assert_close(before[:, :, :9], after[:, :, :9], rtol=0, atol=1e-5)
    assert (before - after)[:, :, 9:13].abs().max() > 1e-2
    assert (before - after)[:, :, 13:].abs().max() > 1e-4  # the decoder looks back


@pytest.mark.parametrize("cuts", [(1,), (3,), (1, 2, 4), (1, 2, 3, 4, 5)])
def test_a_stream_is_what_one_call_decodes(encoder: VideoVAE, cuts: tuple[int, ...]) -> None:
    latents = torch.randn(2, 2, 6, 4, 2, 3)
    state, parts = None, []
    for begin, end in zip((0, *cuts), (*cuts, 6), strict=True):
        part, state = encoder.decode_stream(latents[:, :, begin:end], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=2), encoder.decode(latents), rtol=0, atol=1e-5)


def test_the_first_latent_of_a_stream_is_one_frame(encoder: VideoVAE) -> None:
    first, state = encoder.decode_stream(torch.randn(1, 1, 3, 4, 2, 3))
    later, _ = encoder.decode_stream(torch.randn(1, 1, 3, 4, 2, 3), state)
    assert (first.shape[2], later.shape[2]) == (9, 12)


def test_latents_are_normalised_with_the_stored_mean_and_deviation(encoder: VideoVAE) -> None:
    video = random_video(9)
    raw = random_network().encode(video[0])
    expected = (raw - encoder.mean[:, None, None]) / encoder.std[:, None, None]
    torch.testing.assert_close(encoder.encode(video)[0], expected.detach())


def test_sub_clips_are_encoded_as_clips_of_their_own(encoder: VideoVAE) -> None:
    video = random_video(21, b=2)
    starts = {0: 21, 3: 17, 4: 9, 8: 13, 11: 1, 12: 9}
    found = encoder.encode_starts(video, starts)
    assert list(found) == list(starts)
    for start, count in starts.items():
        expected = encoder.encode(video[:, :, start : start + count])
        torch.testing.assert_close(found[start], expected, rtol=0, atol=1e-5)


def test_an_autocast_around_it_changes_nothing(encoder: VideoVAE) -> None:
    video = random_video(5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder.encode(video)
        frames = encoder.decode(inside)
    assert torch.equal(inside, encoder.encode(video))
    assert torch.equal(frames, encoder.decode(inside))


def test_bfloat16_gives_nearly_the_same(tmp_path: Path) -> None:
    path, video = random_weights(tmp_path), random_video(9)
    exact, fast = VideoVAE(path), VideoVAE(path, dtype="bfloat16")
    assert next(fast.parameters()).dtype == torch.bfloat16
    latents, rounded = exact.encode(video), fast.encode(video)
    assert rounded.dtype == torch.float32
    assert (latents - rounded).abs().max() < 0.05 * latents.abs().max()
    assert fast.fingerprint == exact.fingerprint


def test_the_fingerprint_names_values_not_their_storage(tmp_path: Path) -> None:
    half = VideoVAE(random_weights(tmp_path, dtype=torch.float16))
    again = VideoVAE(random_weights(tmp_path, dtype=torch.float16))
    other = VideoVAE(random_weights(tmp_path, seed=1, dtype=torch.float16))
    assert half.fingerprint == again.fingerprint
    assert half.fingerprint != other.fingerprint
    wide = {name: value.float() for name, value in half.network.state_dict().items()}
    write_weights(tmp_path / "wide.safetensors", wide, {"kind": "video_encoder", "network": NODE})
    assert VideoVAE(str(tmp_path / "wide.safetensors")).fingerprint == half.fingerprint


def test_another_decoder_for_the_same_latents_has_the_same_fingerprint(tmp_path: Path) -> None:
    encoder = VideoVAE(random_weights(tmp_path))
    for part, is_same in (("decoder.first.weight", True), ("encoder.first.weight", False), ("mean", False)):
        state = {name: value.clone() for name, value in encoder.network.state_dict().items()}
        state[part] += 1
        write_weights(tmp_path / "changed.safetensors", state, {"kind": "video_encoder", "network": NODE})
        assert (VideoVAE(str(tmp_path / "changed.safetensors")).fingerprint == encoder.fingerprint) == is_same, part


def test_it_is_frozen(encoder: VideoVAE) -> None:
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_principal_components_come_back_from_the_linear_maps() -> None:
    network = VideoVAENetwork(**{name: value for name, value in NODE.items() if name != "_target_"})
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(768, 4, generator=generator))[0]
    mean = torch.randn(768, generator=generator) * 0.1
    spread = torch.tensor([4.0, 3.0, 2.0, 1.0])
    network.begin_linear(mean, basis * spread.square() @ basis.T)
    scores = torch.randn(2, 3, 6, 4, generator=generator)
    blocks = (scores * spread) @ basis.T + mean  # n f cells 768
    pictures = blocks.reshape(6, 2, 3, 768).permute(0, 3, 1, 2)
    groups = torch.nn.functional.pixel_shuffle(pictures, 8)
    latents = network.encoder(groups)
    torch.testing.assert_close(latents.var((0, 2, 3)), scores.reshape(-1, 4).var(0), rtol=1e-3, atol=1e-3)
    restored, _ = network.decoder(latents, 2, None)
    torch.testing.assert_close(restored, groups, rtol=1e-3, atol=1e-3)


def test_weights_that_are_no_first_stage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no first stage 'nothing'"):
        VideoVAE("nothing")
    write_weights(tmp_path / "ar.safetensors", {}, {"kind": "ar_diffusion"})
    with pytest.raises(ConfigError, match="holds a 'ar_diffusion'"):
        VideoVAE(str(tmp_path / "ar.safetensors"))
    tensors = random_network().state_dict()
    del tensors["decoder.first.weight"]
    write_weights(tmp_path / "less.safetensors", tensors, {"kind": "video_encoder", "network": NODE})
    with pytest.raises(ConfigError, match="'decoder.first.weight'"):
        VideoVAE(str(tmp_path / "less.safetensors"))
    wrong = {"_target_": "longtake.encoders.text.WordsEncoder"}
    write_weights(tmp_path / "other.safetensors", tensors, {"kind": "video_encoder", "network": wrong})
    with pytest.raises(ConfigError, match="builds a WordsEncoder"):
        VideoVAE(str(tmp_path / "other.safetensors"))


def test_the_shipped_first_stage_is_small_and_its_latents_are_normalised() -> None:
    path = SHIPPED / "video_vae_doom.safetensors"
    assert path.stat().st_size <= 8_000_000
    encoder = VideoVAE("video_vae_doom")
    assert (encoder.geometry.ratio_time, encoder.geometry.ratio_space, encoder.geometry.channels) == (4, 8, 16)
    assert encoder.encode(torch.zeros(1, 1, 5, 3, 48, 64)).shape == (1, 1, 2, 16, 6, 8)
