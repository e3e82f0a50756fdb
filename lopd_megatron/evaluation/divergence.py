"""KL(π ‖ π_T) per token from responses of π that both models have scored.

    sampled   log π(y) − log π_T(y): unbiased for the KL over the whole vocabulary, noisy, may be negative
    estimate  Σ p (log p − log q) over the tokens in both lists, and log p − log q of the sampled token where
              it is not in both: unbiased, too, and less noisy
    class     KL over classes that both models name: the sampled token, tokens in both lists of the k most
              likely, and the rest as one; at least 0 and at most the KL over the vocabulary

A token which the teacher names and the model does not is less likely than all k that the model names, so
leaving it in the rest changes little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lopd_megatron.train.held_out import ratio_error

SMALLEST_REST = 2.0**-24
"""Of either model: float32 log-probs say no more of what is left."""


@dataclass(frozen=True)
class Measured:
    """Sums by prompt [d]: samples of a prompt depend on each other."""

    topk: int
    tokens: np.ndarray
    sampled: np.ndarray
    estimates: np.ndarray
    classes: np.ndarray
    responses: np.ndarray
    stopped: np.ndarray
    teacher_stop_logprob: float | None

    def summary(self) -> dict[str, Any]:
        """Plain values; `by_prompt` lets two models be compared prompt by prompt."""
        return {
            "topk": self.topk,
            "prompts": len(self.tokens),
            "responses": int(self.responses.sum()),
            "response_tokens": int(self.tokens.sum()),
            "sampled_kl": ratio(self.sampled, self.tokens),
            "kl_estimate": ratio(self.estimates, self.tokens),
            "class_kl": ratio(self.classes, self.tokens),
            "stopped": ratio(self.stopped, self.responses),
            "teacher_stop_logprob": self.teacher_stop_logprob,
            "by_prompt": {
                "tokens": self.tokens.tolist(),
                "sampled_kl": self.sampled.tolist(),
                "kl_estimate": self.estimates.tolist(),
                "class_kl": self.classes.tolist(),
            },
        }

    def text(self) -> str:
        found = self.summary()
        whole, classes, stopped = (found[name] for name in ("kl_estimate", "class_kl", "stopped"))
        return (
            f"KL {whole['value']:.4f} ± {whole['standard_error']:.4f}, class KL "
            f"{classes['value']:.4f} ± {classes['standard_error']:.4f} nats per token "
            f"({found['response_tokens']} tokens); {stopped['value']:.0%} of the responses stop by themselves"
        )


def ratio(sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Σ sums / Σ counts and its standard error over prompts."""
    value = float(sums.sum() / counts.sum())
    return {"value": value, "standard_error": ratio_error(sums - value * counts, counts)}


def measured(by_teacher: Sequence[dict[str, Any]], by_model: Sequence[dict[str, Any]], topk: int) -> Measured:
    """From the same rollouts, rows of SCORE_SCHEMA, scored by the teacher and by their own model."""
    place: dict[str, int] = {}
    sums: list[list[float]] = []
    stop_logprobs = []
    for teacher, model in zip(by_teacher, by_model, strict=True):
        assert teacher["document_id"] == model["document_id"]
        if not teacher["response_tokens"]:
            continue
        if teacher["prompt_id"] not in place:
            place[teacher["prompt_id"]] = len(sums)
            sums.append([0.0] * 6)
        gap = np.subtract(teacher["rollout_logprobs"], teacher["teacher_logprobs"], dtype=np.float64)
        stopped = teacher["finish_reason"] == "stop"
        if stopped:
            stop_logprobs.append(teacher["teacher_logprobs"][-1])
        estimate, classes = divergences(teacher, model, topk)
        found = (len(gap), gap.sum(), estimate.sum(), classes.sum(), 1, stopped)
        own = sums[place[teacher["prompt_id"]]]
        for index, value in enumerate(found):
            own[index] += float(value)
    tokens, sampled, estimates, classes, responses, stops = np.array(sums).T
    mean = float(np.mean(stop_logprobs)) if stop_logprobs else None
    return Measured(topk, tokens, sampled, estimates, classes, responses, stops, mean)


def divergences(teacher: dict[str, Any], model: dict[str, Any], topk: int) -> tuple[np.ndarray, np.ndarray]:
    """(estimate, class KL), float64 [r] in nats, of the r tokens of one rollout that both have scored."""
    labels = np.array(teacher["response_tokens"])[:, None]
    ids_q, log_q = _topk(teacher, topk)
    ids_p, log_p = _topk(model, topk)
    same = ids_p[:, :, None] == ids_q[:, None, :]  # [r, k, k]
    is_shared = same.any(2)
    label_is_shared = (is_shared & (ids_p == labels)).any(1)
    others = is_shared & (ids_p != labels)
    log_q = (same * np.where(same.any(1), log_q, 0.0)[:, None, :]).sum(2)
    label_p, label_q = (np.array(row["teacher_logprobs"], np.float64) for row in (model, teacher))
    p, q = np.where(others, np.exp(log_p), 0.0), np.where(others, np.exp(log_q), 0.0)
    named = np.where(others, p * (log_p - log_q), 0.0).sum(1)
    label = np.exp(label_p) * (label_p - label_q)
    rest_p = np.maximum(1.0 - np.exp(label_p) - p.sum(1), SMALLEST_REST)
    rest_q = np.maximum(1.0 - np.exp(label_q) - q.sum(1), SMALLEST_REST)
    classes = named + label + rest_p * np.log(rest_p / rest_q)
    return named + np.where(label_is_shared, label, label_p - label_q), classes


def _topk(row: dict[str, Any], topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs [r, k] of a row of SCORE_SCHEMA."""
    ids = np.array(row["teacher_topk_ids"]).reshape(-1, topk)
    return ids, np.array(row["teacher_topk_logprobs"], np.float64).reshape(-1, topk)
