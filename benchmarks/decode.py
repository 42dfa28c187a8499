"""Token decoding against transformers' generate with a static cache: tokens a second and bytes moved a second.

Same size, weights, precision and start, in turn in one process; greedy and with top_p 0.8. A figure is the time of a
long rollout less that of a short one, so that neither pays for its start. Bytes are the weights that a step reads
(without the embedding) and the cached keys and values. transformers computes one step for a batch, as we do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import Paired, paired, write_result
from longtake.networks.token_decode import PackedWeights
from longtake.networks.token_head import FullHead
from longtake.networks.token_transformer import TokenTransformer, token_layout
from longtake.rollout.noise import NoiseKey
from longtake.rollout.tokens import TokenRollout
from longtake.types import Conditions

SHORT, GIVEN = 1, 2  # latent frames: new ones of the short rollout, given ones of both


@dataclass(frozen=True)
class Size:
    """A Llama: one axis of rotary positions, no QK-norm, 64,000 codes."""

    dim: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 64000


SIZES = {
    "small": Size(dim=256, layers=4, ffn=704, heads=8, kv_heads=2),
    "medium": Size(dim=512, layers=8, ffn=1408, heads=8, kv_heads=2),
    "large": Size(dim=1024, layers=12, ffn=2816, heads=16, kv_heads=4),
}


def run(argv: list[str]) -> int:
    """Prints tokens a second of both, their ratio and the bytes moved, for every batch and way of sampling."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    dtype = getattr(torch, args.dtype)
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "dtype": args.dtype}
    print(f"{figures['threads']} threads, {args.dtype}, {args.rounds} rounds, {args.new - args.frame} tokens timed")
    for name in args.sizes:
        peer, network = candidates(SIZES[name], args.frame, args.new, dtype)
        packed = network.pack()
        print(f"{name}: {_read(network) / 1e6:.0f} MB a step; logits differ by {_gap(peer, network):.1e}")
        for batch in args.batches:
            for way in args.sampling:
                key = f"{name}, batch {batch}, {way}"
                figures[key] = _compare(key, peer, network, packed, batch, way, args)
                write_result("decode", figures, args.output)  # after every row, so that a run cut short keeps its rows
    return 0


def candidates(size: Size, frame: int, new: int, dtype: torch.dtype) -> tuple[nn.Module, TokenTransformer]:
    """Returns transformers' Llama and ours with the same weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.dim,
        num_hidden_layers=size.layers,
        intermediate_size=size.ffn,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=GIVEN * frame + new,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    peer = LlamaForCausalLM(config).eval().to(dtype)
    network = TokenTransformer(
        dim=size.dim,
        num_layers=size.layers,
        num_heads=size.heads,
        num_kv_heads=size.kv_heads,
        ffn_dim=size.ffn,
        vocab_size=size.vocab,
        grid_lat=(GIVEN + new // frame, 1, frame),
        head=FullHead,
        rope="1d",
        qk_norm=False,
    )
    network.load_state_dict(llama_weights(peer.state_dict(), size.layers))
    return peer, network.eval().to(dtype)


def llama_weights(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Returns the weights of transformers' Llama under our names."""
    ours = {
        "embedding.table.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "head.output.weight": theirs["lm_head.weight"],
    }
    for index in range(layers):
        layer, name = f"model.layers.{index}.", f"layers.{index}."
        ours[f"{name}qkv.weight"] = torch.cat([theirs[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"])
        ours[f"{name}gate_up.weight"] = torch.cat([theirs[f"{layer}mlp.{p}_proj.weight"] for p in ("gate", "up")])
        ours[f"{name}out.weight"] = theirs[f"{layer}self_attn.o_proj.weight"]
        ours[f"{name}down.weight"] = theirs[f"{layer}mlp.down_proj.weight"]
        ours[f"{name}attn_norm.weight"] = theirs[f"{layer}input_layernorm.weight"]
        ours[f"{name}ffn_norm.weight"] = theirs[f"{layer}post_attention_layernorm.weight"]
    return ours


def _compare(
    key: str,
    peer: nn.Module,
    network: TokenTransformer,
    packed: PackedWeights,
    batch: int,
    way: str,
    args: argparse.Namespace,
) -> dict[str, Any]:
    frame, new = args.frame, args.new
    ids = torch.randint(0, network.vocab_size, (batch, GIVEN * frame), generator=torch.Generator().manual_seed(1))
    rollout = TokenRollout(temperature=0.0 if way == "greedy" else 1.0, top_p=0.8)
    context = ids.view(batch, 1, GIVEN, 1, frame)
    noise = NoiseKey(0, tuple(range(batch)))
    told = {"do_sample": False} if way == "greedy" else {"do_sample": True, "top_p": 0.8, "top_k": 0}

    def ours(count: int) -> None:
        for _ in rollout(network, context, Conditions(), GIVEN + count // frame, noise, packed=packed):
            pass

    def theirs(count: int) -> None:
        made = peer.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            cache_implementation="static",
            disable_compile=True,
            **told,
        )
        assert made.shape[1] == ids.shape[1] + count, f"generate made {made.shape[1] - ids.shape[1]} tokens"

    result = paired(_speed(ours, batch, frame, new), _speed(theirs, batch, frame, new), args.rounds)
    bytes_a_step = _read(network) + _cached(network, batch, GIVEN * frame + (frame + new) // 2)
    moved = [bytes_a_step * max(speeds) / batch / 1e9 for speeds in (result.ours, result.peer)]
    print(f"{result.row(f'{key}, ours | peer', 'tokens/s')}; GB/s {moved[0]:.1f} | {moved[1]:.1f}", flush=True)
    return _json(result, moved)


def _speed(decode: Callable[[int], None], batch: int, frame: int, new: int) -> Callable[[], float]:
    def tokens_a_second() -> float:
        seconds = []
        for count in (new, SHORT * frame):
            start = time.perf_counter()
            decode(count)
            seconds.append(time.perf_counter() - start)
        return batch * (new - SHORT * frame) / (seconds[0] - seconds[1])

    return tokens_a_second


@torch.no_grad()
def _gap(peer: nn.Module, network: TokenTransformer) -> float:
    """Largest difference of the logits of a short sequence, relative to the largest logit."""
    frame = network.grid_lat[2]
    ids = torch.randint(0, network.vocab_size, (1, 2 * frame), generator=torch.Generator().manual_seed(2))
    hidden, _ = network(ids.view(1, 2, 1, 1, 1, frame), Conditions(), token_layout(2, views=1, height=1, width=frame))
    logits = network.head.logits(hidden.flatten(1, 2)[:, 1:])
    expected = peer(ids[:, :-1]).logits
    return float((logits - expected).abs().max() / expected.abs().max())


def _read(network: TokenTransformer) -> int:
    """Bytes of the weights that every step reads."""
    skipped = network.embedding.table.weight.nbytes
    return sum(parameter.nbytes for parameter in network.parameters()) - skipped


def _cached(network: TokenTransformer, batch: int, tokens: int) -> int:
    block: Any = network.layers[0]
    width = 2 * len(network.layers) * block.num_kv_heads * block.head_dim
    return batch * tokens * width * network.norm.weight.element_size()


def _json(result: Paired, moved: list[float]) -> dict[str, Any]:
    return result.to_json() | {"gb_a_second_ours": moved[0], "gb_a_second_peer": moved[1]}


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks decode", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "medium", "large"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sampling", nargs="+", choices=["greedy", "top_p"], default=["greedy", "top_p"])
    parser.add_argument("--frame", type=int, default=32, help="tokens of a latent frame")
    parser.add_argument("--new", type=int, default=96, help="tokens of the long rollout, whole frames")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args(argv)
    if args.new % args.frame or args.new <= SHORT * args.frame:
        parser.error(f"--new is {args.new}; expected two or more whole frames of {args.frame}")
    return args
