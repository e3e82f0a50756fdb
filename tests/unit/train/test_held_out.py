"""The verdict on a run: a difference of sums over the same documents, with its error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.config import LossConfig
from lopd_megatron.train.held_out import Validation, change, choose_metric, read_validations
from lopd_megatron.train.metrics import JsonLines


def validations(differences: list[float], documents: int = 200, seed: int = 0) -> list[Validation]:
    """Documents whose values differ far more than what training changes."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 200, documents).astype(float)
    level = rng.normal(0.5, 0.3, documents)
    found = []
    for iteration, difference in enumerate(differences):
        noise = rng.normal(0, 0.02, documents)
        found.append(Validation(10 * iteration, "reverse_kl", (level + difference + noise) * tokens, tokens))
    return found


@pytest.mark.parametrize(
    ("differences", "verdict", "best"),
    [
        ([0.0, -0.02, -0.03], "better", 20),
        ([0.0, 0.02, 0.03], "worse", 0),
        ([0.0, -0.05, 0.0], "no change", 10),
    ],
)
def test_a_verdict_is_paired(differences: list[float], verdict: str, best: int) -> None:
    found = change(validations(differences))
    assert found is not None
    assert found.verdict == verdict
    assert found.best.iteration == best
    # Planted: errors of both values as if they were of different documents would see nothing.
    apart = np.hypot(found.before.standard_error, found.after.standard_error)
    assert abs(found.difference) < 2 * apart


def test_the_error_is_that_of_repeated_draws() -> None:
    """Documents are drawn anew 400 times; the spread of the difference is its standard error."""
    drawn = [change(validations([0.0, 0.01], seed=seed)) for seed in range(400)]
    differences = np.array([found.difference for found in drawn if found])
    errors = np.array([found.standard_error for found in drawn if found])
    assert errors.mean() == pytest.approx(differences.std(), rel=0.12)  # 400 draws know a spread to 3.5 %


def test_other_documents_are_not_compared() -> None:
    first, second = validations([0.0])[0], validations([0.0], documents=100)[0]
    assert change([first, second]) is None
    assert change([first]) is None


def test_the_file_keeps_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    written = validations([0.0, -0.1])
    log = JsonLines(path, -1)
    for validation in written:
        log.write(validation.iteration, validation.line())
    log.close()
    read = read_validations(path)
    assert [v.iteration for v in read] == [0, 10]
    for one, other in zip(written, read, strict=True):
        assert np.array_equal(one.sums, other.sums)
        assert one.text() == other.text()


def test_what_a_run_is_judged_by() -> None:
    scored = frozenset({"tokens", "loss_mask", "teacher_logprobs", "rollout_logprobs"})
    assert choose_metric(LossConfig(), scored | {"teacher_topk_ids"}) == "reverse_kl"
    assert choose_metric(LossConfig(), scored) == "k2"
    assert choose_metric(LossConfig(objective="sft"), scored) == "loss"
    assert choose_metric(LossConfig(objective="sft"), frozenset({"tokens"})) == "loss"
