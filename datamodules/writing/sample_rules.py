"""What a set and each of its samples must be like, for those who write sets and those who check them."""

from __future__ import annotations

import io
import json
import re
import tokenize
from collections.abc import Iterable
from typing import Any

import numpy as np

from datamodules.shards import NAME_PATTERN, control_member, video_member
from datamodules.sources.base import RawSample, SourceInfo
from longtake.errors import BadSampleError, ConfigError

MEMBER_PATTERN = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
EXTENSIONS = ("mp4", "npy", "txt", "json", "safetensors")
"""How a member may end. Everything else is refused: nothing in a set is ever executed."""


def check_source_info(info: SourceInfo) -> None:
    """Refuses a source that cannot become a set.

    Raises:
        ConfigError: licence or origin is missing, a name does not fit the format, or the frame size is odd.
    """
    for what in ("name", "licence", "origin"):
        value = getattr(info, what)
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(
                f"the source states {what} {value!r}; expected a sentence, since every set says what it is, "
                f"where it comes from and under which terms it may be used. Change `source.{what}`."
            )
    for what in ("view_names", "control_types"):
        names = getattr(info, what)
        bad = [name for name in names if not NAME_PATTERN.fullmatch(name)]
        if bad or len(set(names)) != len(names):
            raise ConfigError(
                f"{what} are {', '.join(map(repr, names))}; expected different names of letters, digits, _ "
                f"and -. Change the source's {what}."
            )
    if not info.view_names:
        raise ConfigError("the source names no view; expected at least one ('main' for a single camera)")
    if info.video is not None and (info.video.height % 2 or info.video.width % 2 or info.video.fps <= 0):
        raise ConfigError(
            f"frames of {info.video.width}x{info.video.height} at {info.video.fps} fps cannot be written as "
            "h264 with yuv420p; expected an even width and height and a positive rate. Change "
            "`video.height`, `video.width`, `video.fps`."
        )


def check_sample(sample: RawSample, info: SourceInfo) -> int | None:
    """Returns the number of pixel frames of a sample, None where only its encoded video can say.

    Raises:
        BadSampleError: the sample is not what `info` says, with the first thing that is wrong.
    """
    check_key(sample.key)
    if not isinstance(sample.episode, str) or not sample.episode or not sample.episode.isprintable():
        raise BadSampleError(f"episode is {sample.episode!r}; expected a printable name")
    num_frames = _check_pixels(sample, info)
    _check_encoded(sample, info)
    members = {*sample.encoded, *(["tokens.npy"] if sample.tokens is not None else [])}
    check_content(members | {video_member(view, info.view_names) for view in sample.views}, info)
    if num_frames is None and not has_encoded_video(sample):
        raise BadSampleError("num_frames is missing and there is no video to count them in")
    if num_frames is not None:
        check_tables(sample, info, num_frames)
    if sample.tokens is not None:
        check_tokens(sample.tokens, info)
    for caption in sample.captions:
        check_caption(caption)
    return num_frames


def check_key(key: object) -> None:
    """Raises BadSampleError if a key cannot name the members of a sample."""
    if not isinstance(key, str) or not NAME_PATTERN.fullmatch(key):
        raise BadSampleError(f"key is {key!r}; expected letters, digits, _ and - only")


def check_caption(caption: object) -> None:
    """Raises BadSampleError if a caption is not one line of text."""
    if not isinstance(caption, str) or not caption.strip() or len(caption.splitlines()) != 1:
        raise BadSampleError(f"caption is {caption!r}; expected one line of text")


def check_content(members: set[str], info: SourceInfo) -> None:
    """Raises BadSampleError if nothing to train on is there, or something the set states is missing."""
    if info.tokens is not None and "tokens.npy" not in members:
        raise BadSampleError("tokens are missing; the source states them for every sample")
    if info.latents is not None and "latents.safetensors" not in members:
        raise BadSampleError("latents are missing; the source states them for every sample")
    views = {video_member(view, info.view_names) for view in info.view_names}
    if not members & (views | {"tokens.npy", "latents.safetensors"}):
        raise BadSampleError("it has neither video nor tokens nor latents")


def check_tables(sample: RawSample, info: SourceInfo, num_frames: int) -> None:
    """Checks the actions and the states of a sample, see `check_table`."""
    check_table("actions", sample.actions, info.action_names, num_frames)
    check_table("states", sample.states, info.state_names, num_frames)


def check_table(what: str, table: np.ndarray | None, names: tuple[str, ...], num_frames: int) -> None:
    """Checks actions or states against the names of their columns.

    Raises:
        BadSampleError: it is missing or unexpected, not float32 [t, columns], or holds NaN or infinity.
    """
    if table is None or not names:
        if (table is None) == (not names):
            return
        raise BadSampleError(
            f"{what} are missing; expected the columns {', '.join(names)}"
            if table is None
            else f"{what} are there, but the source names no columns for them"
        )
    expected = (num_frames, len(names))
    if not isinstance(table, np.ndarray) or table.dtype != np.float32 or table.shape != expected:
        found = f"{table.dtype} {list(table.shape)}" if isinstance(table, np.ndarray) else type(table).__name__
        raise BadSampleError(f"{what} are {found}; expected float32 {list(expected)}")
    if not np.isfinite(table).all():
        row = int(np.argwhere(~np.isfinite(table))[0][0])
        raise BadSampleError(f"{what} hold NaN or infinity (frame {row}); expected finite numbers")


def check_tokens(tokens: np.ndarray, info: SourceInfo) -> None:
    """Raises BadSampleError if tokens are not integers [v t h w] inside the vocabulary that `info` states."""
    if info.tokens is None:
        raise BadSampleError("tokens are there, but the source states no tokens")
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 4 or not np.issubdtype(tokens.dtype, np.integer):
        raise BadSampleError(f"tokens are {_shape_words(tokens)}; expected integers [v t h w]")
    views, height, width = tokens.shape[0], *tokens.shape[2:]
    expected = (len(info.view_names), *info.tokens["grid"][1:])
    if (views, height, width) != expected or not tokens.size:
        raise BadSampleError(
            f"tokens are {_shape_words(tokens)}; expected {expected[0]} views of {expected[1]} x {expected[2]} a frame"
        )
    low, high, vocab_size = int(tokens.min()), int(tokens.max()), int(info.tokens["vocab_size"])
    if low < 0 or high >= vocab_size:
        raise BadSampleError(f"tokens run from {low} to {high}; expected 0 to {vocab_size - 1}")


def check_member_name(member: str, info: SourceInfo | None) -> None:
    """Raises BadSampleError if a member cannot stand in a set, or names an unknown view or control."""
    extension = member.rpartition(".")[2]
    if not MEMBER_PATTERN.fullmatch(member) or extension not in EXTENSIONS:
        raise BadSampleError(f"member {member!r} is not allowed; expected one that ends in {', '.join(EXTENSIONS)}")
    if extension == "mp4" and info is not None and member not in video_members(info):
        raise BadSampleError(f"member {member!r} is no view or control video of this set")


def video_members(info: SourceInfo) -> list[str]:
    """Returns every video member that a sample may have: views in rig order, then control by type."""
    control = [control_member(kind, view) for kind in info.control_types for view in info.view_names]
    return [*(video_member(view, info.view_names) for view in info.view_names), *control]


def has_encoded_video(sample: RawSample) -> bool:
    """Returns whether a view of the sample passes through as bytes."""
    return any(name.endswith("mp4") and not name.startswith("control.") for name in sample.encoded)


def load_npy(content: bytes) -> np.ndarray:
    """Returns the array of an .npy file; its header is compared with its size before anything is allocated.

    Raises:
        BadSampleError: it is not a whole .npy file of numbers; pickled objects are refused.
    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, is_fortran, dtype = read_header[version](stream)
    except (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError, RecursionError) as error:
        raise BadSampleError(f"not an .npy file ({type(error).__name__}: {str(error)[:200]})") from error
    if dtype.hasobject or dtype.kind not in "biuf":
        raise BadSampleError(f"array of dtype {dtype}; expected numbers")
    expected, found = int(np.prod(shape, dtype=object)) * dtype.itemsize, len(content) - stream.tell()
    if expected != found or any(size < 0 for size in shape):
        raise BadSampleError(f"array {dtype} {list(shape)} needs {expected} bytes, {found} are there")
    return np.frombuffer(content, dtype=dtype, offset=stream.tell()).reshape(shape, order="F" if is_fortran else "C")


def check_safetensors(content: bytes) -> None:
    """Raises BadSampleError if the header of a safetensors file does not fit its content."""
    length = int.from_bytes(content[:8], "little")
    try:
        if len(content) < 8 or length > len(content) - 8:
            raise ValueError(f"header of {length} bytes in a file of {len(content)}")
        header: dict[str, Any] = json.loads(content[8 : 8 + length])
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        ends = [0, *sorted(int(end) for _, end in spans)]
        starts = sorted(int(start) for start, _ in spans)
        if not spans or starts != ends[:-1] or ends[-1] != len(content) - 8 - length:
            raise ValueError("its tensors do not fill the file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSampleError(f"not a safetensors file ({type(error).__name__}: {error})") from error


def _check_pixels(sample: RawSample, info: SourceInfo) -> int | None:
    """Checks every view and control video; returns their common number of frames."""
    videos = list(_named_videos(sample))
    if videos and info.video is None:
        raise BadSampleError("it has video, but the source states no frame size")
    _known("view", sample.views, info.view_names)
    _known("control type", sample.control, info.control_types)
    num_frames = sample.num_frames
    if num_frames is not None and (not isinstance(num_frames, int) or num_frames < 1):
        raise BadSampleError(f"num_frames is {num_frames!r}; expected at least 1")
    for name, frames in videos:
        assert info.video is not None, "checked above"
        size = (info.video.height, info.video.width, 3)
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape[1:] != size:
            raise BadSampleError(f"{name} is {_shape_words(frames)}; expected uint8 [t, {size[0]}, {size[1]}, 3]")
        if len(frames) != (num_frames or len(frames)) or not len(frames):
            raise BadSampleError(
                f"{name} has {len(frames)} frames; expected {num_frames or 'at least 1'}, like the rest"
            )
        num_frames = len(frames)
    return num_frames


def _named_videos(sample: RawSample) -> Iterable[tuple[str, np.ndarray]]:
    for view, frames in sample.views.items():
        yield f"view {view!r}", frames
    for kind, views in sample.control.items():
        for view, frames in views.items():
            yield f"control {kind!r} of view {view!r}", frames


def _check_encoded(sample: RawSample, info: SourceInfo) -> None:
    for kind, views in sample.control.items():
        _known(f"view of control {kind!r}", views, info.view_names)
    taken = {"actions.npy", "states.npy", "txt", "json", "tokens.npy"}
    taken |= {video_member(view, info.view_names) for view in sample.views}
    taken |= {control_member(kind, view) for kind, views in sample.control.items() for view in views}
    for member, content in sample.encoded.items():
        check_member_name(member, info)
        if member in taken:
            raise BadSampleError(f"encoded member {member!r} is also there in plain form; expected only one of them")
        if not isinstance(content, bytes):
            raise BadSampleError(f"encoded member {member!r} is {type(content).__name__}; expected bytes")


def _known(what: str, given: Iterable[str], valid: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(valid))
    if unknown:
        raise BadSampleError(f"unknown {what} {unknown[0]!r}; expected one of: {', '.join(valid) or 'none'}")


def _shape_words(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
