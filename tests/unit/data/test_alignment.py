"""A model that scores its own rollouts finds the same numbers; other numbers are refused, the cause named."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.data.alignment import Sample, Scorer, compare, refuse_misaligned, sample_indices
from lopd_megatron.data.build_dataset import build_dataset
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.manifest import read_manifest
from lopd_megatron.errors import UserError
from lopd_megatron.inference.hf_scorer import hf_scorer
from tests.unit.data.qwen import PROMPT, RESPONSE, sample_rollouts, save_qwen
from tests.unit.data.samples import row, write_shards

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_qwen(folder / "student", 0), save_qwen(folder / "other", 1)


@pytest.fixture(scope="module")
def scorer(models: tuple[Path, Path]) -> Scorer:
    return hf_scorer(models[0])


@pytest.fixture(scope="module")
def samples(models: tuple[Path, Path]) -> list[Sample]:
    return sample_rollouts(models[0], 16)


def test_the_generating_model_finds_its_numbers(scorer: Scorer, samples: list[Sample]) -> None:
    report = compare(samples, scorer, TOLERANCE)
    assert report.holds
    assert (report.documents, report.tokens) == (16, 16 * RESPONSE)
    # Sampled in one batch, scored one by one in float32: only the order of sums differs.
    assert report.max_abs_difference < 1e-5


def test_a_model_scored_against_itself_gives_exactly_zero(scorer: Scorer, samples: list[Sample]) -> None:
    pairs = [(s.tokens[:PROMPT].tolist(), s.tokens[PROMPT:].tolist()) for s in samples]
    stored = [np.concatenate([np.zeros(PROMPT, np.float32), values]) for values in scorer(pairs)]
    own = [replace(s, rollout_logprobs=values) for s, values in zip(samples, stored, strict=True)]
    report = compare(own, scorer, TOLERANCE)
    assert report.mean_abs_difference == report.max_abs_difference == 0.0


def shifted(by: int) -> Callable[[list[Sample]], list[Sample]]:
    def apply(samples: list[Sample]) -> list[Sample]:
        return [replace(s, rollout_logprobs=np.roll(s.rollout_logprobs, by)) for s in samples]

    return apply


def swap_two(samples: list[Sample]) -> list[Sample]:
    values = [s.rollout_logprobs for s in samples]
    values[3], values[9] = values[9], values[3]
    return [replace(s, rollout_logprobs=v) for s, v in zip(samples, values, strict=True)]


@pytest.mark.parametrize(
    ("damage", "diagnosis"),
    [
        pytest.param(shifted(1), "one token too late", id="late"),
        pytest.param(shifted(-1), "one token too early", id="early"),
        pytest.param(swap_two, "2 of 16 documents are wrong and the others right", id="swapped"),
    ],
)
def test_misplaced_values(
    scorer: Scorer,
    samples: list[Sample],
    damage: Callable[[list[Sample]], list[Sample]],
    diagnosis: str,
) -> None:
    report = compare(damage(samples), scorer, TOLERANCE)
    assert diagnosis in report.diagnosis
    with pytest.raises(UserError, match=f"scores: the generating model does not find .*{diagnosis}"):
        refuse_misaligned(report, "scores")


def test_another_temperature(models: tuple[Path, Path], scorer: Scorer) -> None:
    report = compare(sample_rollouts(models[0], 16, temperature=0.7), scorer, TOLERANCE)
    assert "another temperature" in report.diagnosis


def test_another_model(models: tuple[Path, Path], scorer: Scorer, samples: list[Sample]) -> None:
    report = compare(samples, hf_scorer(models[1]), TOLERANCE)
    assert "another model" in report.diagnosis
    assert report.mean_abs_difference > 0.5


def test_one_swapped_document_among_many_does_not_hide_in_the_mean(
    scorer: Scorer, samples: list[Sample]
) -> None:
    """The mean over 64 documents is below the tolerance, and still they are refused."""
    report = compare(swap_two(samples * 4), scorer, tolerance=0.1)
    assert report.mean_abs_difference <= 0.1
    assert "2 of 64 documents are wrong" in report.diagnosis


def test_the_worst_place_is_reported(scorer: Scorer, samples: list[Sample]) -> None:
    values = samples[5].rollout_logprobs.copy()
    values[PROMPT + 4] -= 3.0
    damaged = [replace(s, rollout_logprobs=values) if s.index == 5 else s for s in samples]
    report = compare(damaged, scorer, TOLERANCE)
    assert (report.worst_document, report.worst_position) == (5, PROMPT + 4)
    assert report.max_abs_difference == pytest.approx(3.0, abs=1e-4)
    assert "document 5, token 7" in report.line()


def test_untrained_tokens_do_not_count(scorer: Scorer, samples: list[Sample]) -> None:
    values, mask = samples[0].rollout_logprobs.copy(), samples[0].loss_mask.copy()
    values[PROMPT + 4], mask[PROMPT + 4] = -50.0, 0
    damaged = [replace(samples[0], rollout_logprobs=values, loss_mask=mask), *samples[1:]]
    assert compare(damaged, scorer, TOLERANCE).holds


def test_a_scorer_that_fails(samples: list[Sample]) -> None:
    def broken(documents: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        return [np.full(len(response), np.nan, np.float32) for _, response in documents]

    with pytest.raises(
        UserError, match="document 0: 12 log-probs came back for 12 tokens, or one is not finite"
    ):
        compare(samples, broken, TOLERANCE)


@pytest.mark.parametrize("honest", [True, False])
def test_the_build_keeps_the_proof_or_refuses(
    scorer: Scorer, samples: list[Sample], tmp_path: Path, honest: bool
) -> None:
    shift = 0 if honest else 1
    rows = [
        row(
            f"p{s.index}",
            s.tokens[:PROMPT].tolist(),
            s.tokens[PROMPT:].tolist(),
            rollout_logprobs=np.roll(s.rollout_logprobs[PROMPT:], shift).tolist(),
        )
        for s in samples
    ]
    folder = write_shards(tmp_path / "scores", [rows])

    def build() -> None:
        build_dataset(
            folder,
            tmp_path / "x",
            filters=Filters(100),
            proof=lambda found: compare(found, scorer, TOLERANCE),
            proof_documents=8,
        )

    if not honest:
        with pytest.raises(UserError, match="one token too late; do not train on it"):
            build()
        return
    build()
    alignment = read_manifest(tmp_path / "x").alignment
    assert alignment is not None
    assert alignment["documents"] == 8
    assert alignment["mean_abs_difference"] < 1e-5


def test_the_sample_is_spread_over_the_dataset() -> None:
    assert sample_indices(100, 3) == [0, 50, 99]
    assert sample_indices(2, 16) == [0, 1]
