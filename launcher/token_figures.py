"""What `predict.py only_eval=true` does with a token model: score clips beside baselines and write the figures."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from launcher.predict_jobs import provenance
from launcher.recorded import scored_clips, training_clips
from longtake.errors import ConfigError, DataError
from longtake.generate_tokens import TokenModel
from longtake.geometry import latent_frames
from longtake.metrics.token_baselines import NAMES as BASELINES
from longtake.metrics.token_baselines import TokenBaselines
from longtake.metrics.token_top500 import K
from longtake.rollout_report import write_json
from longtake.token_evaluation import TokenClip, TokenEvaluation

logger = logging.getLogger("longtake")
Sample = tuple[str, np.ndarray, np.ndarray]


def score_tokens(cfg: DictConfig, model: TokenModel, folder: Path) -> None:
    """Scores the clips that the config names; writes metrics.json, spec.json and, where wanted, a submission.

    Raises:
        ConfigError: a setting that does not fit the weights or the data.
        DataError: there is nothing to score.
    """
    given = cfg.num_context_frames if cfg.num_context_frames is not None else model.spec.num_context_frames
    start_lat = latent_frames(given, model.spec.trained_for.ratio, "num_context_frames") if given else 0
    evaluation = TokenEvaluation(
        model,
        start_lat=start_lat,
        seeds=list(cfg.eval_seeds),
        baselines=_baselines(training_clips(cfg, model), model, max(1, start_lat)),
    )
    samples = _samples(scored_clips(cfg, model), evaluation, cfg.eval_batch_size)
    written: dict[str, Any] = {}
    if cfg.submission is None:
        for _ in samples:
            pass
    else:
        written = {"submission": _submit(cfg, model, samples)}
    if evaluation.num_clips == 0:
        raise DataError("there is no clip to score. Change `input_type`, `data` or `split`.")
    metrics = evaluation.metrics()
    content = {"metrics": metrics, "curves": evaluation.curves(), "provenance": {**provenance(cfg, model), **written}}
    write_json(folder / "metrics.json", content)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    write_json(folder / "spec.json", {"config": resolved, "weights": model.spec.to_dict()})
    logger.info("%d clips scored, figures in %s\n%s", evaluation.num_clips, folder, _table(metrics))


def _baselines(clips: Iterable[TokenClip] | None, model: TokenModel, first_lat: int) -> TokenBaselines | None:
    if clips is None:
        logger.warning(
            "there are no training tokens, so only the uniform guess is compared. Give `baseline_tokens_dir` or `data`."
        )
        return None
    found, count = TokenBaselines(model.spec.vocab_size, first_lat), 0
    for clip in clips:
        found.update(torch.from_numpy(model.check_tokens(clip.tokens, clip.key))[None])
        count += 1
    constants = found.fit()
    logger.info("baselines are fitted on %d training clips, %d tokens", count, int(constants["tokens"]))
    return found


def _samples(clips: Iterator[TokenClip], evaluation: TokenEvaluation, batch_size: int) -> Iterator[Sample]:
    """Scores batch after batch; yields the best tokens of every clip (its first view)."""
    while batch := list(islice(clips, batch_size)):
        top = evaluation.add(batch)
        logger.info("%d clips scored", evaluation.num_clips)
        for clip, indices, values in zip(batch, top.indices[:, 0], top.values[:, 0], strict=True):
            yield clip.key, indices.cpu().numpy(), values.cpu().numpy()


def _submit(cfg: DictConfig, model: TokenModel, samples: Iterator[Sample]) -> str:
    from longtake.metrics.onex_submission import check_submission, write_submission

    path = Path(cfg.submission)
    if path.exists():
        raise ConfigError(f"{path} is there already; expected a new file. Change `submission`.")
    readme = {str(name): "" if value is None else str(value) for name, value in cfg.submission_readme.items()}
    count = write_submission(path, samples, readme)
    grid, vocab = model.spec.grid_lat, model.spec.vocab_size
    problems = check_submission(
        path, num_samples=None, grid=(grid[0], grid[1], grid[2]), vocab_size=vocab, k=min(K, vocab)
    )
    if problems:
        raise DataError(f"{path} cannot be handed in: {problems[0]}. Report this, since it was written here.")
    logger.info("submission %s: %d samples", path, count)
    return str(path)


def _table(metrics: dict[str, float | None]) -> str:
    """Returns the cross entropies in nats and bits a token, the model's first, then every other figure."""
    names = ["nll_full_tf", "nll_shuffled_actions", "ce_sampled_prefix_mean", "ce_greedy_rollout"]
    names += [f"nll_{name}" for name in BASELINES] + ["ce_top500_logits", "ce_top500_logprobs"]
    lines = []
    for name in names:
        value = metrics.get(name)
        if value is not None:
            lines.append(f"  {name:<24} {value:7.3f} nats  {value / np.log(2):7.3f} bits a token")
    others = ("below_best_baseline", "accuracy", "ce_sampled_prefix_std", "top500_hit_share")
    looks = [name for name in metrics if name.startswith(("psnr_", "ssim_"))]
    lines += [f"  {name:<24} {metrics[name]:7.3f}" for name in (*others, *looks) if metrics.get(name) is not None]
    return "\n".join(lines)
