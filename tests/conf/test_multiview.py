"""experiment=ar_multiview: its parts fit each other, and one key changes what belongs together."""

from __future__ import annotations

from hydra.utils import instantiate

from launcher.check_config import check_config
from launcher.compose import compose, resolved
from longtake.objectives.frame_conditioned import FrameConditioned
from longtake.rollout.sliding_plan import Windows

EXPERIMENT = "experiment=ar_multiview"


def test_control_types_are_stated_once() -> None:
    cfg = compose("train", [EXPERIMENT, "network.control.types=[depth,edge]"])
    check_config(cfg)
    plain = resolved(cfg)
    assert plain["data"]["control"] == ["depth", "edge"]
    assert plain["data"]["build"]["source"]["control"] == ["depth", "edge"]


def test_the_rig_of_the_network_is_that_of_the_data() -> None:
    plain = resolved(compose("train", [EXPERIMENT]))
    assert plain["network"]["views"]["rig"] == plain["data"]["build"]["source"]["make"]["source"]["rig"]


def test_it_trains_as_the_reference_draws() -> None:
    cfg = compose("train", [EXPERIMENT])
    objective = instantiate(cfg.objective)
    assert isinstance(objective, FrameConditioned)
    assert objective.clean_latents == [0.5, 0.25, 0.25]
    assert objective.control_dropout == 0.15
    assert objective.views == (1, 7)
    trained = objective.trained_for(num_frames_px=cfg.video.num_frames, ratio=4)
    assert trained.starts_lat == (0, 1, 2)
    assert Windows(chunk_px=cfg.video.num_frames, overlap_px=1, num_frames_px=561).is_exact


def test_both_designs_and_no_control_are_one_override_away() -> None:
    for word in ("network/views=cross", "network/mixer=lact", "data.control=[]"):
        check_config(compose("train", [EXPERIMENT, word]))
