"""Video tokenizers: geometry, bit-exact prefixes and streams, fingerprints, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.encoders.cosmos_tokenizer import CosmosVideoTokenizer, VideoFSQ
from longtake.encoders.video_tokens import TokenGeometry
from longtake.errors import ConfigError, DataError
from longtake.pretrained.weights_file import write_weights
from tests.first_stage import (
    TOKENS_NODE,
    random_blocks,
    random_tokens_network,
    random_tokens_weights,
    random_video,
    random_weights,
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> VideoFSQ:
    return VideoFSQ(random_tokens_weights(tmp_path))


def random_tokens(num_lat: int, *, b: int = 1, v: int = 1) -> torch.Tensor:
    return torch.randint(0, 64000, (b, v, num_lat, 2, 3), generator=torch.Generator().manual_seed(num_lat))


def test_geometry() -> None:
    geometry = TokenGeometry(8, 8, (8, 8, 8, 5, 5, 5))
    assert geometry.vocab_size == 64000
    assert geometry.grid(48, 64) == (6, 8)
    with pytest.raises(ConfigError, match="video.height is 50; expected a multiple of 8, for example 48 or 56"):
        geometry.grid(50, 64)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (9, 2), (17, 3)])
def test_one_and_8k_frames_are_one_and_k_latents(tokenizer: VideoFSQ, frames: int, latents: int) -> None:
    video = random_video(frames, b=2, v=3)
    tokens = tokenizer.encode(video)
    assert tokens.shape == (2, 3, latents, 2, 3)
    assert tokens.dtype == torch.int64
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == video.shape
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1


@pytest.mark.parametrize("settings", [{}, {"ratio_space": 16, "channels_mult": [1, 1, 2]}])
def test_prefixes_are_equal_bit_for_bit(settings: dict[str, object]) -> None:
    tokenizer = CosmosVideoTokenizer(random_tokens_network(**settings), {})
    video = random_blocks(17, b=2, height=32, width=48)
    tokens = tokenizer.encode(video)
    assert len(tokens.unique()) > 20
    frames = tokenizer.decode(tokens)
    for num_px, num_lat in ((1, 1), (9, 2)):
        assert torch.equal(tokenizer.encode(video[:, :, :num_px]), tokens[:, :, :num_lat])
        assert torch.equal(tokenizer.decode(tokens[:, :, :num_lat]), frames[:, :, :num_px])


@pytest.mark.parametrize("cuts", [(1,), (3,), (1, 2, 4), (1, 2, 3, 4, 5)])
def test_a_stream_is_what_one_call_decodes_bit_for_bit(tokenizer: VideoFSQ, cuts: tuple[int, ...]) -> None:
    tokens = random_tokens(6, b=2, v=2)
    state, parts = None, []
    for begin, end in zip((0, *cuts), (*cuts, 6), strict=True):
        part, state = tokenizer.decode_stream(tokens[:, :, begin:end], state)
        assert part.shape[2] == 8 * (end - begin) - (7 if begin == 0 else 0)
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=2), tokenizer.decode(tokens))


def test_it_gives_what_the_network_gives_at_once(tokenizer: VideoFSQ) -> None:
    video, network = random_blocks(17, b=2, height=32), random_tokens_network()
    tokens = tokenizer.encode(video)
    assert (network.encode(video[:, 0])[0] == tokens[:, 0]).float().mean() > 0.99  # but for ties of the rounding
    frames, _ = network.decode(tokens[:, 0])
    torch.testing.assert_close(tokenizer.decode(tokens)[:, 0], frames.clamp(-1, 1), rtol=0, atol=1e-4)


def test_without_attention_over_time_the_state_of_a_stream_does_not_grow() -> None:
    tokenizer = CosmosVideoTokenizer(random_tokens_network(temporal_attention=False), {})
    sizes, state = [], None
    for _ in range(4):
        _, state = tokenizer.decode_stream(random_tokens(1), state)
        sizes.append(sum(part.numel() for part in state))
    assert len(set(sizes)) == 1


def test_sub_clips_are_encoded_as_clips_of_their_own(tokenizer: VideoFSQ) -> None:
    video = random_video(25, b=2)
    found = tokenizer.encode_starts(video, {0: 17, 3: 9, 8: 17})
    assert list(found) == [0, 3, 8]
    assert torch.equal(found[3], tokenizer.encode(video[:, :, 3:12]))


def test_wrong_lengths_and_sizes_name_the_nearest_legal_ones(tokenizer: VideoFSQ) -> None:
    with pytest.raises(ConfigError, match=r"is 16; expected 1 \+ k\*8 frames, for example 9 or 17"):
        tokenizer.encode(random_video(16))
    with pytest.raises(ConfigError, match="video.width is 20; expected a multiple of 8, for example 16 or 24"):
        tokenizer.encode(random_video(9, width=20))


@pytest.mark.parametrize("wrong", [-1, 64000])
def test_tokens_of_another_codebook_are_refused(tokenizer: VideoFSQ, wrong: int) -> None:
    tokens = random_tokens(2)
    tokens[0, 0, 1, 1, 2] = wrong
    with pytest.raises(DataError, match=rf"tokens reach from .*{wrong}.*; expected 0 to 63999"):
        tokenizer.decode(tokens)


def test_what_is_no_grid_of_tokens_is_refused(tokenizer: VideoFSQ) -> None:
    for wrong in (random_tokens(2)[0], random_tokens(2).float(), random_tokens(2)[:, :, :0]):
        with pytest.raises(ConfigError, match=r"whole numbers, \[batch, views, latent frames, rows, columns\]"):
            tokenizer.decode(wrong)


def test_an_autocast_around_it_changes_nothing(tokenizer: VideoFSQ) -> None:
    video = random_video(9)
    with torch.autocast("cpu", torch.bfloat16):
        inside = tokenizer.encode(video)
        frames = tokenizer.decode(inside)
    assert torch.equal(inside, tokenizer.encode(video))
    assert torch.equal(frames, tokenizer.decode(inside))


def test_bfloat16_gives_nearly_the_same(tmp_path: Path) -> None:
    path, video = random_tokens_weights(tmp_path), random_blocks(9, height=48, width=48)
    exact, fast = VideoFSQ(path), VideoFSQ(path, dtype="bfloat16")
    assert fast.dtype == torch.bfloat16
    tokens = exact.encode(video)
    near = (exact.network.quantizer.digits(tokens) - exact.network.quantizer.digits(fast.encode(video))).abs()
    assert near.max() <= 1
    assert near.float().mean() < 0.1  # ties of the rounding
    frames = exact.decode(tokens)
    assert (frames - fast.decode(tokens)).abs().mean() < 0.05 * frames.abs().mean()
    assert fast.fingerprint == exact.fingerprint


def test_the_fingerprint_names_values_not_their_storage(tmp_path: Path) -> None:
    half = VideoFSQ(random_tokens_weights(tmp_path, dtype=torch.float16))
    other = VideoFSQ(random_tokens_weights(tmp_path, seed=1, dtype=torch.float16))
    assert half.fingerprint != other.fingerprint
    wide = {name: value.float() for name, value in half.network.state_dict().items()}
    write_weights(tmp_path / "wide.safetensors", wide, {"kind": "video_tokens", "network": TOKENS_NODE})
    assert VideoFSQ(str(tmp_path / "wide.safetensors")).fingerprint == half.fingerprint


def test_it_is_frozen(tokenizer: VideoFSQ) -> None:
    assert not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_weights_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a 'video_encoder'; expected a 'video_tokens'"):
        VideoFSQ(random_weights(tmp_path))
    tensors = random_tokens_network().state_dict()
    del tensors["quant_conv.conv3d.weight"]
    write_weights(tmp_path / "less.safetensors", tensors, {"kind": "video_tokens", "network": TOKENS_NODE})
    with pytest.raises(ConfigError, match="'quant_conv.conv3d.weight'"):
        VideoFSQ(str(tmp_path / "less.safetensors"))
    with pytest.raises(ConfigError, match="unknown type of numbers 'int8'"):
        VideoFSQ(random_tokens_weights(tmp_path), dtype="int8")
