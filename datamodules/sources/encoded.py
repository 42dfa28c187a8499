"""A Longtake set of pixels, once more as latents (or tokens) and encoded texts: training pays for no frozen encoder.

Every sample holds several encodings, each a causal start of its own: one of the whole clip, and others that begin every
`start_stride` frames, so that training may take sub-clips. Which encoders made them is stated in `dataset.json`, with
their fingerprints and, for word ids, the vocabulary, which is that of the training captions.
"""

from __future__ import annotations

import copy
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.loading.reading import Sample, SplitReader
from datamodules.shards import DatasetInfo, video_member
from datamodules.sources.base import RawSample, Skipped, Source, SourceInfo, Task
from datamodules.sources.control_frames import check_control, control_frames
from longtake.errors import BadSampleError, ConfigError

if TYPE_CHECKING:  # torch is imported where something is encoded, not where tasks are listed
    import torch
    from torch import Tensor

_log = logging.getLogger("longtake")
_DTYPES = ("float16", "float32")
_MOST_NAMED = 20


class EncodedSource(Source):
    """Latents and texts of the clips of a set, or tokens where the video encoder is a discrete one.

    Args:
        input: folder of the set.
        video: config node of the video encoder.
        text: config node of the text encoder; None leaves texts out. Beside tokens there are none.
        start_stride: pixel frames from start to start of further encodings, besides that of the whole clip; None: none.
        num_frames: pixel frames of these, 1 + k * ratio; None: as far as the clip goes.
        dtype: of the latents in the file, "float16" or "float32"; tokens are int32.
        make: {"source": node, "num_workers": processes} of the set in `input`, made where it is not there; None: never.
        control: control videos that are encoded like the views, with latents only; "edge" is extracted from the views
            where the set has none.
    """

    def __init__(
        self,
        *,
        input: str | None,  # noqa: A002 (the name of the key)
        video: Mapping[str, Any],
        text: Mapping[str, Any] | None = None,
        start_stride: int | None = None,
        num_frames: int | None = None,
        dtype: str = "float16",
        make: Mapping[str, Any] | None = None,
        control: Sequence[str] = (),
    ) -> None:
        if input is None:
            raise ConfigError("there is no set to encode; expected the folder of one. Change `input`.")
        if dtype not in _DTYPES:
            raise ConfigError(f"source.dtype is {dtype!r}; expected {' or '.join(_DTYPES)}. Change `source.dtype`.")
        if start_stride is not None and start_stride < 1:
            raise ConfigError(
                f"source.start_stride is {start_stride}; expected 1 or more. Change `source.start_stride`."
            )
        self._root = Path(input).expanduser().absolute()
        self._video, self._text, self._make = copy.deepcopy((video, text or None, make))
        self._start_stride, self._num_frames, self._dtype = start_stride, num_frames, dtype
        self._control = tuple(control)

    # What it is

    @property
    def version(self) -> dict[str, Any]:
        """What decides the content besides the settings: the encoders' weights and the set that is encoded."""
        return {"code": 1, "encoder": self._encoder.fingerprint, "input": self._input_fingerprint()}

    def info(self) -> SourceInfo:
        base = self._base.source
        if base.video is None:
            raise ConfigError(f"{self._root} holds no pixels to encode; expected a set with videos. Change `input`.")
        geometry = self._encoder.geometry
        grid = geometry.grid(base.video.height, base.video.width)
        if self._num_frames is not None:
            from longtake.geometry import latent_frames

            latent_frames(self._num_frames, geometry.ratio_time, "source.num_frames")
        origin = f"{base.origin} (encoded; pixels are in the set {base.name})"
        common = {
            "ratio_time": geometry.ratio_time,
            "ratio_space": geometry.ratio_space,
            "encoder_fingerprint": self._encoder.fingerprint,
        }
        if not self._is_discrete:
            check_control(self._control, base, self._root, "source.control")
            control = {"control": list(self._control)} if self._control else {}
            latents = {"channels": geometry.channels, **common, "text": self._text_node, **control}
            return replace(
                base, name=f"{base.name}-latents", origin=origin, control_types=(), tokens=None, latents=latents
            )
        if self._control:
            raise ConfigError("control videos are cached with latents only, not with tokens. Set `source.control=[]`.")
        if self._text is not None:
            raise ConfigError("texts are cached with latents only, not with tokens. Set `encoder/text=none`.")
        longest = max((length for split in self._base.splits.values() for length in split.lengths), default=1)
        tokens = {
            "vocab_size": geometry.vocab_size,
            "grid": [1 + (longest - 1) // geometry.ratio_time, *grid],
            "tokenizer": self._encoder.fingerprint,
            "start_frames": self._num_frames,
            **common,
        }
        return replace(base, name=f"{base.name}-tokens", origin=origin, control_types=(), tokens=tokens, latents=None)

    def tasks(self) -> list[Task]:
        tasks = []
        for split, info in self._base.splits.items():
            first = 0
            for shard in info.shards:
                payload = {"split": split, "first": first, "count": shard.num_samples}
                tasks.append(Task(shard.file.removesuffix(".tar"), split, payload))
                first += shard.num_samples
        return tasks

    def samples(self, task: Task) -> Iterator[RawSample | Skipped]:
        import torch

        reader = SplitReader(self._base, task.payload["split"])
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # there is a worker a core, and each encodes clips of its own
        try:
            for number in range(task.payload["first"], task.payload["first"] + task.payload["count"]):
                sample = reader[number]
                try:
                    yield self._encoded(sample)
                except BadSampleError as error:
                    yield Skipped(sample.key, str(error))
        finally:
            torch.set_num_threads(num_threads)

    # Encoding

    def _encoded(self, sample: Sample) -> RawSample:
        import safetensors.torch
        import torch

        from datamodules.loading.decoding import read_array, read_meta

        base = self._base.source
        captions = _captions(sample)
        encodings = self._encodings(sample)
        if self._is_discrete:
            tokens = {start: np.ascontiguousarray(own.numpy(), np.int32) for start, own in encodings.items()}
            encoded = {f"tokens.{start}.npy": _npy(own) for start, own in tokens.items() if start}
        else:
            tokens = {}
            dtype = getattr(torch, self._dtype)
            latents = {f"latents.{start}": own.to(dtype).contiguous() for start, own in encodings.items()}
            latents |= self._control_latents(sample, dtype)
            encoded = {"latents.safetensors": safetensors.torch.save({**latents, **self._texts(captions)})}
        meta = {name: value for name, value in read_meta(sample).items() if name not in ("episode", "num_frames")}
        return RawSample(
            key=sample.key,
            episode=str(read_meta(sample).get("episode", sample.key)),
            actions=read_array(sample, "actions.npy") if base.action_names else None,
            states=read_array(sample, "states.npy") if base.state_names else None,
            captions=captions,
            meta=meta,
            tokens=tokens.get(0),
            encoded=encoded,
            num_frames=sample.num_frames,
        )

    def _encodings(self, sample: Sample) -> dict[int, Tensor]:
        """Returns the encodings by their first frame, [v t c h w], or [v t h w] of tokens."""
        from longtake.media.read import read_video

        names = self._base.source.view_names
        members = [video_member(name, names) for name in names]
        return self._codes([read_video(sample.read(m), verified=sample.verified) for m in members])

    def _codes(self, views: Sequence[np.ndarray]) -> dict[int, Tensor]:
        """Returns the encodings of views, uint8 [t h w c] each."""
        import torch

        video = torch.stack([torch.from_numpy(view) for view in views]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        encodings = self._encoder.encode_starts(video[None], self._starts(video.shape[1]))
        return {start: codes[0] for start, codes in encodings.items()}

    def _control_latents(self, sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the encodings of control videos, `control.<type>.<start>` [v t c h w], zeros where a view has none,
        and which views have one, `control_mask.<type>` [v]."""
        import torch

        found = {}
        for kind in self._control:
            views = control_frames(sample, kind, self._base.source)
            there = torch.tensor([view is not None for view in views])
            found[f"control_mask.{kind}"] = there
            some = next((view for view in views if view is not None), None)
            if some is None:
                raise BadSampleError(f"has no control video {kind!r} in any view")
            codes = self._codes([np.zeros_like(some) if view is None else view for view in views])
            for start, own in codes.items():
                found[f"control.{kind}.{start}"] = (own * there.view(-1, 1, 1, 1, 1)).to(dtype).contiguous()
        return found

    def _starts(self, available: int) -> dict[int, int]:
        """Returns how many frames to encode from each start."""
        ratio = self._encoder.geometry.ratio_time

        def whole(count: int) -> int:
            return 1 + (count - 1) // ratio * ratio

        starts = {0: whole(available)}
        for start in range(self._start_stride or available, available, self._start_stride or available):
            if self._num_frames is None or start + self._num_frames <= available:
                starts[start] = self._num_frames or whole(available - start)
        return starts

    def _texts(self, captions: list[str]) -> dict[str, Tensor]:
        """Returns the fields of every caption, [n ...]; of an empty one where there is none."""
        if self._text_encoder is None:
            return {}
        fields = self._text_encoder(captions or [""])
        return {name: value[:, 0].contiguous() for name, value in fields.items()}

    # Parts

    @cached_property
    def _base(self) -> DatasetInfo:
        """The set that is encoded, made first where it is not there and may be made."""
        if self._make is not None:
            from datamodules.writing.build import ensure_dataset

            workers = self._make.get("num_workers") or os.cpu_count() or 1
            return ensure_dataset(
                self._maker(), self._root, self._make_request(), num_workers=workers, key="data.build.source"
            )
        return DatasetInfo.load(self._root, key="input")

    def _input_fingerprint(self) -> str:
        """Returns that of the set that is encoded, without making it."""
        if self._make is None:
            return self._base.fingerprint
        from datamodules.writing.build import WriterSettings, full_request, request_fingerprint

        return request_fingerprint(full_request(self._maker(), self._make_request(), WriterSettings()))

    def _maker(self) -> Any:
        return _built((self._make or {})["source"])

    def _make_request(self) -> dict[str, Any]:
        return {"source": (self._make or {})["source"]}

    @cached_property
    def _encoder(self) -> Any:
        return _built(self._video)

    @property
    def _is_discrete(self) -> bool:
        """Whether the encoder makes tokens."""
        return hasattr(self._encoder.geometry, "vocab_size")

    @cached_property
    def _text_node(self) -> dict[str, Any] | None:
        """The node of the text encoder, complete: with the vocabulary where it is made of words."""
        if self._text is None:
            return None
        from longtake.encoders.text import WordsEncoder, count_words

        encoder = _built(self._text)
        if not isinstance(encoder, WordsEncoder) or encoder.words is not None:
            return dict(self._text)
        encoder = encoder.with_vocabulary(count_words(self._captions_of("train")))
        assert encoder.words is not None
        _log.info("vocabulary of the training captions: %d words", len(encoder.words))
        known = set(encoder.words)
        for split in self._base.splits:
            unknown = {w: n for w, n in count_words(self._captions_of(split)).most_common() if w not in known}
            if unknown:
                named = ", ".join(list(unknown)[:_MOST_NAMED])
                _log.warning("%s: %d words are not in the vocabulary: %s", split, len(unknown), named)
        return encoder.node()

    @cached_property
    def _text_encoder(self) -> Any:
        return None if self._text_node is None else _built(self._text_node)

    def _captions_of(self, split: str) -> Iterator[str]:
        if split not in self._base.splits:
            raise ConfigError(f"{self._root} has no split {split!r} to take the vocabulary from. Change `input`.")
        reader = SplitReader(self._base, split)
        for number in range(len(reader)):
            yield from _captions(reader[number])

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the encoders: every worker builds its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_encoder", "_text_encoder")}


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _captions(sample: Sample) -> list[str]:
    """Returns the captions of a sample, in order, as `read_caption` counts them."""
    if not sample.has("txt"):
        return []
    lines = [line.strip() for line in sample.read("txt").decode("utf-8", errors="replace").split("\n")]
    return [line for line in lines if line]


def _built(node: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all")
