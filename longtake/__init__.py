"""Everything of Longtake that is plain PyTorch: no module in here imports Lightning or Hydra.

import longtake
model = longtake.load("weights/ar_chunk3f.safetensors")
video = model.generate(num_frames=81, actions="forward", seed=0).video()  # uint8 [samples v t h w c]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtake.generate import VideoModel


def load(
    path: str | Path, trust: Sequence[str] = (), device: str = "cpu", *, encoder: Mapping[str, Any] | None = None
) -> VideoModel:
    """Returns a trained model, ready to `generate`.

    Args:
        path: a run folder, an exported .safetensors file, or a .ckpt of a run.
        trust: packages whose classes the file may name, besides longtake itself. Nothing else in it is ever executed.
        device: where to put it.
        encoder: config nodes {"video": ..., "text": ...} in place of those in the file, which know no folders: for a
            first stage that is not shipped with longtake.

    Raises:
        longtake.errors.ConfigError: there is no such file, it cannot be read, or it names something that it may not.
    """
    from longtake.loading import load as load_model  # torch is slow to import, and data workers need none

    return load_model(path, trust, device, encoder=encoder)
