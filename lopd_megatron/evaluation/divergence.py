"""KL(π ‖ π_T) per token from responses of π that both models have scored.

    sampled   log π(y) − log π_T(y): unbiased for the KL over the whole vocabulary, noisy, may be negative
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
            "class_kl": ratio(self.classes, self.tokens),
            "stopped": ratio(self.stopped, self.responses),
            "teacher_stop_logprob": self.teacher_stop_logprob,
            "by_prompt": {
                "tokens": self.tokens.tolist(),
                "sampled_kl": self.sampled.tolist(),
                "class_kl": self.classes.tolist(),
            },
        }

    def text(self) -> str:
        found = self.summary()
        sampled, classes, stopped = (found[name] for name in ("sampled_kl", "class_kl", "stopped"))
        return (
            f"sampled KL {sampled['value']:.4f} ± {sampled['standard_error']:.4f}, class KL "
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
            sums.append([0.0] * 5)
        gap = np.subtract(teacher["rollout_logprobs"], teacher["teacher_logprobs"], dtype=np.float64)
        stopped = teacher["finish_reason"] == "stop"
        if stopped:
            stop_logprobs.append(teacher["teacher_logprobs"][-1])
        found = (len(gap), gap.sum(), class_kl(teacher, model, topk).sum(), 1, stopped)
        own = sums[place[teacher["prompt_id"]]]
        for index, value in enumerate(found):
            own[index] += float(value)
    tokens, sampled, classes, responses, stops = np.array(sums).T
    mean = float(np.mean(stop_logprobs)) if stop_logprobs else None
    return Measured(topk, tokens, sampled, classes, responses, stops, mean)


def class_kl(teacher: dict[str, Any], model: dict[str, Any], topk: int) -> np.ndarray:
    """float64 [r], nats: KL over the classes of each of the r tokens of one scored rollout."""
    labels = np.array(teacher["response_tokens"])[:, None]
    ids, named = ({}, {})
    for name, row in (("q", teacher), ("p", model)):
        ids[name] = np.array(row["teacher_topk_ids"]).reshape(-1, topk)
        named[name] = np.array(row["teacher_topk_logprobs"], np.float64).reshape(-1, topk)
    same = (ids["p"][:, :, None] == ids["q"][:, None, :]) & (ids["p"] != labels)[:, :, None]  # [r, k, k]
    in_both = same.any(2)
    log_q = np.where(in_both, (same * named["q"][:, None, :]).sum(2), 0.0)
    log_p = np.where(in_both, named["p"], 0.0)
    label_p = np.array(model["teacher_logprobs"], np.float64)
    label_q = np.array(teacher["teacher_logprobs"], np.float64)
    p, q = np.where(in_both, np.exp(log_p), 0.0), np.where(in_both, np.exp(log_q), 0.0)
    rest_p = np.maximum(1.0 - np.exp(label_p) - p.sum(1), SMALLEST_REST)
    rest_q = np.maximum(1.0 - np.exp(label_q) - q.sum(1), SMALLEST_REST)
    divergence = np.exp(label_p) * (label_p - label_q) + (p * (log_p - log_q)).sum(1)
    return divergence + rest_p * np.log(rest_p / rest_q)
