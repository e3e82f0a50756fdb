"""The teacher's column: scored again at the end of scoring, and held to that proof by the build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.data.build_dataset import build_dataset
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.teacher_proof import PROOF_FILE
from lopd_megatron.errors import UserError
from lopd_megatron.files import sha256_file, write_json
from lopd_megatron.records import SCORE_SCHEMA
from lopd_megatron.rollouts import programs, shard_files
from lopd_megatron.rollouts.prompts import run_prompts
from lopd_megatron.rollouts.score_stage import ScoreJob
from lopd_megatron.rollouts.share import Share
from tests.unit.rollouts.test_programs import FakeVllmEngine, config

__all__ = ["config"]  # a fixture


@pytest.fixture
def scored(config: RunConfig) -> RunConfig:
    config.scores.topk = config.loss.topk = 2
    config.rollouts.max_response_tokens = 20
    run_prompts(config)
    programs.run_rollouts(config, Share())
    assert programs.run_scoring(config, Share()) == 0
    return config


def build(config: RunConfig) -> dict:
    manifest = build_dataset(
        config.paths.scores, config.paths.dataset_prefix, filters=Filters(64), vocab_size=50
    )
    assert manifest.vocab_size == 50
    return manifest.teacher_proof or {}


def rows_with(table: pa.Table, name: str, values: list) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, SCORE_SCHEMA.field(name), pa.array(values, SCORE_SCHEMA.field(name).type))


def shift(table: pa.Table) -> pa.Table:
    values = table["teacher_logprobs"].to_pylist()
    return rows_with(table, "teacher_logprobs", [[row[0], *row[:-1]] for row in values])


def exchange(table: pa.Table) -> pa.Table:
    """The rows of one length change places."""
    values = table["teacher_logprobs"].to_pylist()
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(values):
        by_length.setdefault(len(row), []).append(index)
    for rows in by_length.values():
        moved = [values[index] for index in rows]
        for index, row in zip(rows, [*moved[1:], moved[0]], strict=True):
            values[index] = row
    return rows_with(table, "teacher_logprobs", values)


def topk_of_another_row(table: pa.Table) -> pa.Table:
    values = table["teacher_topk_logprobs"].to_pylist()
    return rows_with(table, "teacher_topk_logprobs", [[0.5 * v for v in row] for row in values])


def other_topk_ids(table: pa.Table) -> pa.Table:
    values = table["teacher_topk_ids"].to_pylist()
    return rows_with(table, "teacher_topk_ids", [[v + 7 for v in row] for row in values])


FAULTS = [shift, exchange, topk_of_another_row, other_topk_ids]


def test_the_proof_is_made_recorded_and_not_made_twice(scored: RunConfig) -> None:
    proof = json.loads((scored.paths.scores / PROOF_FILE).read_text())
    assert proof["documents"] == 16
    assert proof["mean_abs_difference"] == proof["topk_mean_abs_difference"] == 0
    assert proof["topk_same_ids"] == 1
    started = FakeVllmEngine.started
    assert programs.run_scoring(scored, Share()) == 0
    assert FakeVllmEngine.started == started
    assert build(scored) == proof


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_changed_after_scoring(scored: RunConfig, fault: Callable[[pa.Table], pa.Table]) -> None:
    """Its JSON is made to fit: the build still has the proof, and scoring the teacher."""
    folder = scored.paths.scores
    path, described = shard_files.parquet_path(folder, 0), shard_files.manifest_path(folder, 0)
    pq.write_table(fault(pq.read_table(path)), path)
    write_json(described, json.loads(described.read_text()) | {"sha256": sha256_file(path)})
    with pytest.raises(UserError, match=r"a shard was changed after .*teacher_proof.json\); run lopd"):
        build(scored)
    with pytest.raises(UserError, match="the teacher does not find its stored log-probs again"):
        programs.run_scoring(scored, Share())
    (folder / PROOF_FILE).unlink()
    with pytest.raises(UserError, match="the teacher does not find its stored log-probs again"):
        programs.run_scoring(scored, Share())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stage_that_mixes_rows_is_caught_at_its_end(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pa.Table], pa.Table]
) -> None:
    config.scores.topk = config.loss.topk = 2
    run_prompts(config)
    programs.run_rollouts(config, Share())
    stock = ScoreJob.table
    monkeypatch.setattr(ScoreJob, "table", lambda *args: fault(stock(*args)))
    with pytest.raises(UserError, match="the teacher does not find its stored log-probs again"):
        programs.run_scoring(config, Share())
    assert not (config.paths.scores / PROOF_FILE).exists()


def test_a_stage_killed_before_its_proof_makes_it_when_it_is_started_again(scored: RunConfig) -> None:
    proof = (scored.paths.scores / PROOF_FILE).read_bytes()
    (scored.paths.scores / PROOF_FILE).unlink()
    assert build(scored) == {}  # told, not refused: shards of an older version have none
    assert programs.run_scoring(scored, Share()) == 0
    assert (scored.paths.scores / PROOF_FILE).read_bytes() == proof


def test_no_sample_no_proof(config: RunConfig) -> None:
    config.data.alignment_sample = 0
    run_prompts(config)
    programs.run_rollouts(config, Share())
    assert programs.run_scoring(config, Share()) == 0
    assert not (config.paths.scores / PROOF_FILE).exists()


def test_a_damaged_proof_is_one_line(scored: RunConfig) -> None:
    for text in ("{", "[]", '{"a": 1}'):
        (scored.paths.scores / PROOF_FILE).write_text(text)
        with pytest.raises(UserError, match="is no proof of scoring"):
            build(scored)


@pytest.mark.parametrize("topk", [49, 50, 51])
def test_as_many_teacher_tokens_as_the_vocabulary(config: RunConfig, topk: int) -> None:
    config.scores.topk = topk
    run_prompts(config)
    programs.run_rollouts(config, Share())
    with pytest.raises(UserError, match=f"scores.topk={topk} leaves no token of the 50 .* at most 48"):
        programs.run_scoring(config, Share())
    assert not Path(config.paths.scores).exists()
