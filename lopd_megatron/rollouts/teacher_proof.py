"""The proof of the teacher's column: at the end of scoring, the teacher scores a sample of it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lopd_megatron.data.alignment import Sample, compare, sample_indices
from lopd_megatron.data.teacher_proof import PROOF_FILE
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.inference.requests import Engine, Failure, ScoreRequest, ScoringPath, TokenScores
from lopd_megatron.progress import log_line
from lopd_megatron.records import SCORE_SCHEMA
from lopd_megatron.rollouts import shard_files

TopK = tuple[np.ndarray, np.ndarray]
"""Ids and log-probs of a response, [r · k] each."""


def is_proved(folder: Path, num_shards: int) -> bool:
    """Whether the proof in `folder` is that of the shards that are there."""
    shards = shard_files.content_hash(shard_files.manifests(folder, num_shards))
    try:
        return json.loads((folder / PROOF_FILE).read_text())["shards"] == shards
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prove_teacher_column(
    engine: Engine,
    folder: Path,
    num_shards: int,
    *,
    documents: int,
    tolerance: float,
    topk: int,
    path: ScoringPath,
) -> None:
    """Score a sample of the finished shards again and write what was found beside them.

    Every row is found by its own tokens, as they are on the disk, so values that belong to another row, or to
    the token before, differ. UserError where the mean |difference| of the sampled tokens or of the top-k is
    over `tolerance` nats. Cost: `documents` prefills.
    """
    manifests = shard_files.manifests(folder, num_shards)
    samples, topks = _samples(folder, [manifest["rows"] for manifest in manifests], documents)
    if not samples:
        return
    scores: list[TokenScores] = []

    def score_again(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        requests = [
            ScoreRequest((0, row), [*prompt, *response], len(prompt))
            for row, (prompt, response) in enumerate(texts)
        ]
        answers: dict[int, TokenScores] = {}
        for answer in engine.score(requests, topk=topk, path=path):
            row = answer.key[1]
            if isinstance(answer, Failure):
                raise UserError(f"{folder}: row {samples[row].index} is not scored again: {answer.error}")
            answers[row] = answer
        scores.extend(answers[row] for row in range(len(requests)))
        return [score.logprobs for score in scores]

    report = compare(samples, score_again, tolerance)
    difference, same_ids = _compare_topk(topks, scores) if topk else (0.0, 1.0)
    diagnosis = report.diagnosis
    if not diagnosis and (difference > tolerance or same_ids < _LEAST_SAME_IDS):
        diagnosis = f"its top-k differs by {difference:.2e} nats on average and has {same_ids:.0%} of the ids"
    if diagnosis:
        raise UserError(
            f"{folder}: the teacher does not find its stored log-probs again: {report.line()}; {diagnosis}; "
            f"delete {folder} and score again (scores.path=stock is the reference)"
        )
    found = {
        "shards": shard_files.content_hash(manifests),
        **report.as_dict(),
        "topk_mean_abs_difference": difference,
        "topk_same_ids": same_ids,
    }
    write_json(folder / PROOF_FILE, found)
    log_line(f"the teacher finds its log-probs again: {report.line()}")


_LEAST_SAME_IDS = 0.5
"""Near the end of the top-k, rounding lets other ids in."""


def _compare_topk(stored: list[TopK], scores: list[TokenScores]) -> tuple[float, float]:
    """Mean |difference| of the log-probs by rank, and the share of stored ids among the new ones."""
    distance, same, count = 0.0, 0, 0
    for (ids, logprobs), score in zip(stored, scores, strict=True):
        new_ids = score.topk_ids
        distance += float(np.abs(logprobs.reshape(new_ids.shape) - score.topk_logprobs).sum())
        same += int((ids.reshape(new_ids.shape)[:, :, None] == new_ids[:, None, :]).sum())
        count += ids.size
    return distance / count, same / count


def _samples(folder: Path, rows: list[int], count: int) -> tuple[list[Sample], list[TopK]]:
    """Rows spread evenly over all shards, with the teacher's values in place of the rollouts' own; and their
    top-k."""
    starts = np.cumsum([0, *rows])
    chosen = np.array(sample_indices(int(starts[-1]), count) if starts[-1] else [], int)
    samples, topks = [], []
    for index in range(len(rows)):
        mine = chosen[(chosen >= starts[index]) & (chosen < starts[index + 1])]
        if not len(mine):
            continue
        table = shard_files.read_table(folder, index, SCORE_SCHEMA).take(mine - starts[index])
        for place, row in zip(mine.tolist(), table.to_pylist(), strict=True):
            prompt, response = row["prompt_tokens"], row["response_tokens"]
            if not prompt or not response:
                continue
            mask = np.repeat(np.array([0, 1], np.uint8), [len(prompt), len(response)])
            values = np.zeros(len(mask), np.float32)
            values[len(prompt) :] = row["teacher_logprobs"]
            samples.append(Sample(place, np.array([*prompt, *response]), mask, values))
            ids, logprobs = row["teacher_topk_ids"], row["teacher_topk_logprobs"]
            topks.append((np.array(ids, np.int32), np.array(logprobs, np.float32)))
    return samples, topks
