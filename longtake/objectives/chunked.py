"""What teacher forcing and diffusion forcing share: clips are cut into chunks of a fixed number of latent frames."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping

from longtake.errors import ConfigError
from longtake.geometry import whole_chunks
from longtake.objectives.flow_matching import NoiseLevels, start_probabilities
from longtake.objectives.slot_objective import SlotObjective
from longtake.rollout.plan import TrainedFor


class ChunkedObjective(SlotObjective, ABC):
    """A `SlotObjective` on chunks of `chunk_lat` latent frames, the first `num_chunks` of a clip (None: all)."""

    def __init__(
        self,
        *,
        chunk_lat: int,
        num_chunks: int | None,
        noise_levels: NoiseLevels,
        first_chunk_clean: Mapping[str, float],
        text_dropout: float,
        action_dropout: float,
        joint_dropout: float,
    ) -> None:
        super().__init__(
            noise_levels=noise_levels,
            first_chunk_clean=first_chunk_clean,
            text_dropout=text_dropout,
            action_dropout=action_dropout,
            joint_dropout=joint_dropout,
        )
        if chunk_lat < 1:
            raise ConfigError(
                f"video.chunk_lat is {chunk_lat}; expected 1 latent frame or more. Change `video.chunk_lat`."
            )
        if num_chunks is not None and num_chunks < 1:
            raise ConfigError(
                f"objective.num_chunks is {num_chunks}; expected 1 or more, or null for all. "
                "Change `objective.num_chunks`."
            )
        start_probabilities(first_chunk_clean, chunk_lat)
        self.chunk_lat = chunk_lat
        self.num_chunks = num_chunks

    def trained_for(self, *, num_frames_px: int, ratio: int) -> TrainedFor:
        if self.num_chunks is None:
            whole_chunks(num_frames_px, self.chunk_lat, ratio, "video.num_frames")
        return super().trained_for(num_frames_px=num_frames_px, ratio=ratio)

    def chunk_frames(self, num_frames_lat: int) -> int:
        return self.chunk_lat

    def chunks_used(self, num_frames_lat: int) -> int:
        whole, rest = divmod(num_frames_lat, self.chunk_lat)
        if self.num_chunks is None and (rest or not whole):
            raise ConfigError(
                f"a clip has {num_frames_lat} latent frames, which are not whole chunks of {self.chunk_lat}. Change "
                "`video.num_frames` or `video.chunk_lat`, or use only the first chunks with `objective.num_chunks`."
            )
        if self.num_chunks is not None and self.num_chunks > whole:
            raise ConfigError(
                f"objective.num_chunks is {self.num_chunks}, but a clip of {num_frames_lat} latent frames has {whole} "
                f"whole chunks of {self.chunk_lat}. Change `objective.num_chunks` or `video.num_frames`."
            )
        return whole if self.num_chunks is None else self.num_chunks
