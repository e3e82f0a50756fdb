"""Every warning appears when its limit is passed, and only then."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lopd_megatron.lineage import Lineage
from lopd_megatron.report.run_folder import RunFolder, read_run
from lopd_megatron.report.warnings import findings


@pytest.fixture(scope="module")
def run(whole_run: Path) -> RunFolder:
    return read_run(whole_run)


def with_metrics(run: RunFolder, **values: float) -> RunFolder:
    return dataclasses.replace(run, metrics=[line | values for line in run.metrics])


def with_manifest(run: RunFolder, **fields: Any) -> RunFolder:
    return dataclasses.replace(run, datasets=[run.datasets[0].model_copy(update=fields)])


def quiet(run: RunFolder) -> RunFolder:
    """The sample run, whose only finding is its truncated rollouts, without them."""
    return with_manifest(run, kept={"truncated": 0})


def test_only_the_planted_finding(run: RunFolder) -> None:
    assert ["12% of the rollouts are truncated" in text for text in findings(run)] == [True]
    assert findings(quiet(run)) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"effective_sample_fraction": 0.31}, "effective_sample_fraction is 0.31 (limit 0.5)"),
        ({"drift_kl": 0.4}, "drift_kl is 0.400 nats"),
        ({"clip_fraction": 0.5}, "clip_fraction is 50% (limit 20%)"),
    ],
)
def test_training(run: RunFolder, values: dict[str, float], expected: str) -> None:
    (found,) = findings(with_metrics(quiet(run), **values))
    assert expected in found


def test_answers_of_a_teacher_are_not_stale_rollouts(run: RunFolder) -> None:
    """SFT data of vLLM has rollout log-probs, too: the teacher's."""
    assert run.config is not None
    config = run.config.model_copy(deep=True)
    config.loss.objective = "sft"
    sft = dataclasses.replace(with_metrics(quiet(run), drift_kl=9.0), config=config)
    assert findings(sft) == []


def test_training_that_is_not_finished_or_gets_worse(run: RunFolder) -> None:
    half = dataclasses.replace(quiet(run), metrics=quiet(run).metrics[:20])
    assert findings(half) == ["training stands at iteration 20 of 60"]
    told = [{"iteration": 7, "key": "k2_rises", "text": "k2 rose from 0.3 to 4"}]
    assert findings(dataclasses.replace(quiet(run), warnings=told)) == ["iteration 7: k2 rose from 0.3 to 4"]


def test_stop_tokens(run: RunFolder) -> None:
    stops = run.datasets[0].stops
    assert stops is not None
    (found,) = findings(with_manifest(quiet(run), stops=stops | {"teacher_logprob": -9.0}))
    assert "mean log-prob of the tokens that end the rollouts is -9.0 nats" in found
    (found,) = findings(with_manifest(quiet(run), stops=stops | {"special_k2_share": 0.5}))
    assert "50% of the loss at the start is carried by" in found
    fewer = run.measurements | {
        "after": run.measurements["after"] | {"stopped": {"value": 0.4, "standard_error": 0.1}}
    }
    (found,) = findings(dataclasses.replace(quiet(run), measurements=fewer))
    assert "40% of fresh responses stop by themselves" in found


def test_the_best_checkpoint_is_named(run: RunFolder) -> None:
    worse = dataclasses.replace(run.validations[0], iteration=70)
    after = dataclasses.replace(quiet(run), validations=[*run.validations, worse], checkpoints=[50, 60])
    (found,) = findings(after)
    assert "at iteration 60" in found
    assert "is kept" in found
    (found,) = findings(dataclasses.replace(after, checkpoints=[50]))
    assert "is not kept (checkpoint.keep_every)" in found


def test_documents_that_failed_and_shards_that_lack(run: RunFolder) -> None:
    assert run.scored is not None
    shard = run.scored.shards[0] | {"failed": 3, "num_shards": 4}
    broken = dataclasses.replace(run.scored, shards=[shard])
    found = findings(dataclasses.replace(quiet(run), scored=broken))
    assert found[0].startswith("scores: 1 of 4 shards are finished")
    assert found[1].startswith("scores: 3 documents failed")


def test_data(run: RunFolder) -> None:
    (found,) = findings(with_manifest(quiet(run), alignment=None))
    assert "no alignment proof" in found
    (found,) = findings(with_manifest(quiet(run), dropped={"non_finite": 2}))
    assert "2 rollouts had log-probs that are not finite" in found


def test_lineage(run: RunFolder) -> None:
    data = run.datasets[0].lineage
    reason = data.model_copy(update={"allow_mismatch": "an experiment"})
    (found,) = findings(with_manifest(quiet(run), lineage=reason))
    assert "“an experiment”" in found
    other = {"kind": "model", "fingerprint": "9" * 64, "origin": "models/other"}
    (found,) = findings(with_manifest(quiet(run), lineage=data.model_copy(update={"teacher": other})))
    assert found.startswith("Broken rule: The teacher that scored")
    assert findings(with_manifest(quiet(run), lineage=Lineage())) == []


def test_evaluation(run: RunFolder) -> None:
    cut = run.evaluations[0] | {"num_truncated": 64}
    (found,) = findings(dataclasses.replace(quiet(run), evaluations=[cut]))
    assert "25% of the samples are truncated" in found
