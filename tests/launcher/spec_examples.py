"""Specs as the tools that they come from write them; the files that they name are made by `write`."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

VIEWS = ("front_wide", "cross_right", "rear_right", "rear", "rear_left", "cross_left", "front_tele")
ROBOT = ("head_color", "hand_left", "hand_right")


def views(names: tuple[str, ...] = VIEWS, **more: Any) -> dict[str, Any]:
    return {
        name: {"input_path": f"input_videos/{name}.mp4", "control_path": f"controls/{name}.mp4", **more}
        for name in names
    }


EXAMPLES: dict[str, dict[str, Any]] = {
    "transfer25": {
        "name": "auto_multiview",
        "prompt_path": "prompt.txt",
        "negative_prompt": "blurred",
        "seed": 0,
        "guidance": 3,
        "num_conditional_frames": 1,
        "control_weight": 1.0,
        "fps": 10,
        "num_steps": 35,
        "save_combined_views": True,
        **views(),
    },
    "transfer25_autoregressive": {
        "name": "auto_multiview_autoregressive",
        "prompt": "A night drive.",
        "fps": 10,
        "enable_autoregressive": True,
        "num_chunks": 3,
        "chunk_overlap": 1,
        **views(num_conditional_frames_per_view=1),
    },
    "first_release": {
        "name": "auto_multiview",
        "prompt_path": "prompt.txt",
        "fps": 10,
        "save_individual_views": True,
        "save_view_grid": True,
        **views(),
    },
    "fork": {
        "output_dir": "outputs/autoregressive_test_t2v",
        "prompt_path": "prompt.txt",
        "guidance": 3,
        "seed": 2025,
        "n_views": 7,
        "num_conditional_frames": 0,
        "control_weight": 1.0,
        "fps": 10,
        "enable_autoregressive": True,
        "chunk_overlap": 1,
        "num_steps": 35,
        **views(("front_wide", "cross_left", "cross_right", "rear_left", "rear_right", "rear", "front_tele")),
    },
    "fork_30fps": {
        "output_dir": "outputs/autoregressive_test_t2v",
        "prompt": "A car driving through a scenic mountain road during sunset",
        "n_views": 7,
        "num_conditional_frames": 1,
        "num_conditional_frames_per_view": {"front_wide": 5, "rear": 1},
        "no_cond_rear_tele": True,
        "minimum_start_index": 3,
        "fps": 30,
        "enable_autoregressive": True,
        "num_video_frames_loaded_per_view": 85,
        "num_video_frames_per_view": 85,
        **views(),
    },
    "robot": {
        "name": "agibot",
        "prompt": "A robot folds a shirt.",
        "num_conditional_frames": 1,
        "add_camera_prefix": False,
        "num_video_frames_per_chunk": 93,
        "target_height": 720,
        "target_width": 1280,
        "use_negative_prompt": True,
        "preset_edge_threshold": "medium",
        "preset_blur_strength": "low",
        **views(ROBOT),
    },
    "several_controls": {
        "prompt": ["A night drive.", "It begins to rain."],
        "fps": "35/3",
        "num_conditional_frames": 0,
        "front_wide": {"control_path": {"depth": "controls/front_wide.mp4", "labels": "controls/rear.mp4"}},
        "rear": {"control_path": {"depth": "controls/rear.mp4"}, "prompt": "A lorry follows."},
    },
}
NAMES = {name: ROBOT if name == "robot" else VIEWS for name in EXAMPLES}


def write(folder: Path, content: Any, name: str = "spec.json", video: Callable[[Path], None] | None = None) -> Path:
    """Writes a spec and the files that the examples name, and returns its path."""
    for place in ("input_videos", "controls"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        for view in (*VIEWS, *ROBOT):
            path = folder / place / f"{view}.mp4"
            if not path.exists():
                path.touch() if video is None else video(path)
    (folder / "prompt.txt").write_text("A night drive.\n")
    rows = content if isinstance(content, list) and name.endswith("l") else [content]
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder / name


def changed(example: str, path: str, value: Any) -> dict[str, Any]:
    """Returns an example with one value changed; a path such as "front_wide.input_path"; None removes the key."""
    content: Any = deepcopy(EXAMPLES[example])
    *parents, last = path.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    if value is None:
        place.pop(last)
    else:
        place[last] = value
    return content
