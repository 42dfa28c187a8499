"""Released tokenizers: TorchScript archives as the releases lay them out, read strictly and run as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from longtake.encoders.cosmos_layers import Past
from longtake.encoders.cosmos_network import CosmosNetwork
from longtake.encoders.cosmos_tokenizer import CosmosDV, CosmosJit
from longtake.encoders.fsq import FSQ
from longtake.errors import ConfigError
from longtake.pretrained.cosmos_tokenizer import find_legacy, fit, read_tokenizer
from tests.first_stage import random_blocks, random_tokens_network

SIZES: dict[str, Any] = {"channels": 8, "channels_mult": [1, 1, 2], "num_res_blocks": 1}


class Wavelet(nn.Module):
    """Holds the constants that the releases store beside the weights."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("wavelets", "_arange", "patch_size_buffer"):
            self.register_buffer(name, torch.ones(2))


class Quantizer(nn.Module):
    """FSQ with the constants that the releases store."""

    def __init__(self, fsq: FSQ) -> None:
        super().__init__()
        self.fsq = fsq
        self.register_buffer("_levels", torch.tensor(fsq.levels, dtype=torch.int32))
        self.register_buffer("_basis", torch.tensor([1, 8, 64, 512, 2560, 12800], dtype=torch.int32))
        self.register_buffer("implicit_codebook", torch.zeros(4, 6))


class EncoderProgram(nn.Module):
    """encoder.jit: [b 3 t h w] -> (tokens int32, codes [b 6 t h w], a loss of zero)."""

    def __init__(self, network: CosmosNetwork) -> None:
        super().__init__()
        self.encoder, self.quant_conv, self.quantizer = (
            network.encoder,
            network.quant_conv,
            Quantizer(network.quantizer),
        )
        self.encoder.patcher3d = Wavelet()
        self.network = [network]  # in a list, so that it is no submodule

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        network = self.network[0]
        codes = network.quantizer(network.features(video.transpose(1, 2), Past()))
        return network.quantizer.tokens(codes).int(), codes.permute(0, 4, 1, 2, 3), torch.zeros(1)


class Inverse(nn.Module):
    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer


class DecoderProgram(nn.Module):
    """decoder.jit: tokens [b t h w] -> [b 3 t h w]."""

    def __init__(self, network: CosmosNetwork) -> None:
        super().__init__()
        self.inv_quant = Inverse(Quantizer(network.quantizer))
        self.post_quant_conv, self.decoder = network.post_quant_conv, network.decoder
        self.decoder.unpatcher3d = Wavelet()
        self.network = [network]

    def forward(self, tokens: Tensor) -> Tensor:
        network = self.network[0]
        return network.frames(network.quantizer.codes(tokens), Past()).transpose(1, 2)


def release(folder: Path, **settings: Any) -> CosmosNetwork:
    """Writes encoder.jit and decoder.jit of a random network for clips of 17 frames of 32x48, and returns it."""
    network = random_tokens_network(**{**SIZES, "legacy": False, **settings})
    video = random_blocks(17, height=32, width=48)[:, 0]
    tokens = network.encode(video)[0]
    folder.mkdir(exist_ok=True)
    with torch.no_grad():
        torch.jit.trace(EncoderProgram(network), video.transpose(1, 2), check_trace=False).save(folder / "encoder.jit")
        torch.jit.trace(DecoderProgram(network), tokens.int(), check_trace=False).save(folder / "decoder.jit")
    return network


pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("ratio_space", [8, 16])
def test_a_release_is_read_strictly_and_gives_what_its_programs_give(
    tmp_path: Path, legacy: bool, ratio_space: int
) -> None:
    release(tmp_path, legacy=legacy, ratio_space=ratio_space)
    read = CosmosDV(str(tmp_path), ratio_space=ratio_space, **SIZES)
    assert read._config["legacy"] == legacy
    run = CosmosJit(str(tmp_path), ratio_space=ratio_space)
    video = random_blocks(17, height=32, width=48)
    tokens = run.encode(video)
    assert len(tokens.unique()) > 5
    assert (read.encode(video) == tokens).float().mean() > 0.99  # but for ties of the rounding
    torch.testing.assert_close(read.decode(tokens), run.decode(tokens), rtol=0, atol=1e-4)
    assert read.geometry == run.geometry


class Doubling(nn.Module):
    """A causal program of any length: every frame of the video is the running sum of the tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        total = tokens.float().mean((2, 3)).cumsum(1) / 64000
        frames = total.repeat_interleave(8, dim=1)[:, 7:]
        return frames[:, None, :, None, None].expand(-1, 3, -1, 8, 8) / 10


def test_a_stream_of_the_programs_is_what_one_call_decodes(tmp_path: Path) -> None:
    release(tmp_path)
    torch.jit.script(Doubling()).save(str(tmp_path / "decoder.jit"))
    run = CosmosJit(str(tmp_path))
    tokens = torch.randint(0, 64000, (1, 1, 5, 1, 1), generator=torch.Generator().manual_seed(0))
    state, parts = None, []
    for begin, end in ((0, 1), (1, 3), (3, 5)):
        part, state = run.decode_stream(tokens[:, :, begin:end], state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=2), run.decode(tokens))


def test_programs_of_another_ratio_are_noticed(tmp_path: Path) -> None:
    release(tmp_path)
    with pytest.raises(ConfigError, match=r"make \[3, 4, 6\] tokens .* \[3, 2, 3\] were expected"):
        CosmosJit(str(tmp_path), ratio_space=16).encode(random_blocks(17, height=32, width=48))


def test_one_file_of_tensors_is_the_same(tmp_path: Path) -> None:
    network = release(tmp_path / "jit")
    tensors = {
        name: tensor.contiguous()
        for name, tensor in CosmosDV(str(tmp_path / "jit"), **SIZES).network.state_dict().items()
    }
    save_file(tensors, tmp_path / "all.safetensors")
    torch.save(tensors, tmp_path / "all.pt")
    prints = {CosmosDV(str(path), **SIZES).fingerprint for path in (tmp_path / "jit", *tmp_path.glob("all.*"))}
    assert len(prints) == 1
    assert torch.equal(tensors["quant_conv.conv3d.weight"], network.quant_conv.conv3d.weight)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    network = release(tmp_path)
    own = {name: tensor for name, tensor in network.state_dict().items() if "patcher3d" not in name}
    network = random_tokens_network(**{**SIZES, "legacy": False})
    without = {name: tensor for name, tensor in own.items() if name != "decoder.norm_out.norm.weight"}
    with pytest.raises(ConfigError, match="1 tensors are missing: decoder.norm_out.norm.weight"):
        fit(network, without, "file")
    with pytest.raises(ConfigError, match="1 tensors are left over: decoder.more"):
        fit(network, {**own, "decoder.more": torch.zeros(1)}, "file")
    with pytest.raises(ConfigError, match=r"of another shape: decoder.norm_out.norm.weight \[3\] instead of \[8\]"):
        fit(network, {**own, "decoder.norm_out.norm.weight": torch.zeros(3)}, "file")
    with pytest.raises(ConfigError, match=re.escape("levels [8, 8, 8, 8, 8, 8], the settings say [8, 8, 8, 5, 5, 5]")):
        fit(network, {**own, "quantizer._levels": torch.tensor([8] * 6)}, "file")


def test_a_release_of_another_kind_is_refused_by_the_names_of_its_tensors(tmp_path: Path) -> None:
    release(tmp_path, ratio_space=16)
    with pytest.raises(ConfigError, match=r"left over: .*decoder.up.2.upsample.conv2.conv3d.bias"):
        CosmosDV(str(tmp_path), **SIZES)
    release(tmp_path, legacy=True)
    with pytest.raises(ConfigError, match=r"missing: decoder.up.1.upsample.*left over: decoder.up.2.upsample.conv1"):
        CosmosDV(str(tmp_path), **SIZES, legacy=False)


def test_names_that_tell_the_mode() -> None:
    names = {
        f"decoder.up.{level}.upsample.{part}.conv3d.weight": torch.zeros(1) for level in (1, 2) for part in ("conv2",)
    }
    at = {level: {f"decoder.up.{level}.upsample.conv1.conv3d.weight": torch.zeros(1)} for level in (1, 2)}
    assert find_legacy({**names, **at[2]}, "file")
    assert not find_legacy({**names, **at[1]}, "file")
    with pytest.raises(ConfigError, match=r"resolutions \[1, 2\] of the decoder.*encoder.video.legacy=true"):
        find_legacy({**names, **at[1], **at[2]}, "file")


def test_convolutions_that_older_code_made_and_never_used_are_left_out() -> None:
    network = random_tokens_network(**{**SIZES, "legacy": True})
    padded = dict(network.state_dict())
    for place in ("encoder.down.{}.downsample", "decoder.up.{}.upsample"):
        for level in ((0, 1), (1, 2))["up" in place]:
            for part in ("conv1", "conv2", "conv3"):
                name = f"{place.format(level)}.{part}.conv3d.weight"
                padded.setdefault(name, torch.zeros(3))
    extra = len(padded) - len(network.state_dict())
    assert extra == 6
    fresh = random_tokens_network(seed=1, **{**SIZES, "legacy": True})
    fit(fresh, padded, "file")
    assert torch.equal(fresh.decoder.norm_out.norm.weight, network.decoder.norm_out.norm.weight)
    with pytest.raises(ConfigError, match="left over"):
        fit(fresh, {name: tensor for name, tensor in padded.items() if "down.1.downsample.conv2" not in name}, "file")


def test_what_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder.jit cannot be read as TorchScript \(there is no such file\)"):
        read_tokenizer(tmp_path)
    (tmp_path / "encoder.jit").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="encoder.jit cannot be read as TorchScript"):
        read_tokenizer(tmp_path)
    (tmp_path / "all.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="no tensors can be read from .*all.safetensors"):
        read_tokenizer(tmp_path / "all.safetensors")
