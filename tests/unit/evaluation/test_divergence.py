"""Class KL from two lists of most likely tokens, against whole distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lopd_megatron.evaluation.divergence import divergences, measured

V, K = 50, 6


def distributions(rng: np.random.Generator, tokens: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs [r, V] of a model and of a teacher near it."""
    logits = rng.normal(0, 3, (tokens, V))
    other = logits + rng.normal(0, spread, (tokens, V))
    return tuple(x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logits, other))


def scored(name: str, labels: np.ndarray, model: np.ndarray, scorer: np.ndarray) -> dict[str, Any]:
    """A row of SCORE_SCHEMA."""
    top = np.argsort(-scorer, axis=1)[:, :K]
    at = np.arange(len(labels))
    return {
        "document_id": f"{name}/0",
        "prompt_id": name,
        "response_tokens": labels.tolist(),
        "rollout_logprobs": model[at, labels].tolist(),
        "finish_reason": "stop",
        "teacher_logprobs": scorer[at, labels].tolist(),
        "teacher_topk_ids": top.ravel().tolist(),
        "teacher_topk_logprobs": np.take_along_axis(scorer, top, 1).ravel().tolist(),
    }


def rollout(seed: int, tokens: int = 40, spread: float = 1.0) -> tuple[dict, dict, np.ndarray, np.ndarray]:
    """One response scored by teacher and model, and both models' log-probs [r, V]."""
    rng = np.random.default_rng(seed)
    model, teacher = distributions(rng, tokens, spread)
    labels = np.array([rng.choice(V, p=np.exp(row) / np.exp(row).sum()) for row in model])
    name = f"p{seed}"
    return scored(name, labels, model, teacher), scored(name, labels, model, model), model, teacher


def test_class_kl_is_that_of_the_merged_distributions() -> None:
    by_teacher, by_model, model, teacher = rollout(0)
    _, found = divergences(by_teacher, by_model, K)
    for t, label in enumerate(by_teacher["response_tokens"]):
        lists = (set(np.argsort(-x[t])[:K]) for x in (model, teacher))
        named = sorted(set.intersection(*lists) | {label})
        p, q = (np.append(np.exp(x[t])[named], 1 - np.exp(x[t])[named].sum()) for x in (model, teacher))
        assert found[t] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9)


def test_class_kl_lies_between_zero_and_the_whole() -> None:
    by_teacher, by_model, model, teacher = rollout(1, tokens=400)
    whole = (np.exp(model) * (model - teacher)).sum(1)
    _, found = divergences(by_teacher, by_model, K)
    assert (found >= 0).all()
    assert (found <= whole + 1e-12).all()
    assert found.mean() > 0.7 * whole.mean()
    for same in divergences(by_model, by_model, K):
        assert same == pytest.approx(np.zeros(400), abs=1e-12)


def test_both_estimates_meet_the_whole_kl_within_their_errors() -> None:
    rollouts = [rollout(seed, spread=0.7) for seed in range(150)]
    found = measured([r[0] for r in rollouts], [r[1] for r in rollouts], K).summary()
    whole = np.mean([(np.exp(model) * (model - teacher)).sum(1).mean() for *_, model, teacher in rollouts])
    sampled, estimate, classes = found["sampled_kl"], found["kl_estimate"], found["class_kl"]
    for unbiased in (sampled, estimate):
        assert abs(unbiased["value"] - whole) < 3 * unbiased["standard_error"]
    assert estimate["standard_error"] < 0.8 * sampled["standard_error"]
    assert classes["standard_error"] < 0.6 * sampled["standard_error"]
    assert 0.7 * whole < classes["value"] < whole  # six tokens of fifty


def test_prompts_are_the_unit_of_errors_and_stops_are_counted() -> None:
    """The same response four times says no more than once."""
    rollouts = [rollout(seed) for seed in range(20)]
    once = measured([r[0] for r in rollouts], [r[1] for r in rollouts], K).summary()
    rows = [[r[i] | {"finish_reason": "length"} for r in rollouts for _ in range(4)] for i in (0, 1)]
    four = measured(*rows, K).summary()
    for name in ("sampled_kl", "kl_estimate", "class_kl"):
        assert four[name] == pytest.approx(once[name])
    assert (once["stopped"]["value"], four["stopped"]["value"]) == (1.0, 0.0)
    last = np.mean([r[0]["teacher_logprobs"][-1] for r in rollouts])
    assert once["teacher_stop_logprob"] == pytest.approx(last)
    assert four["teacher_stop_logprob"] is None
