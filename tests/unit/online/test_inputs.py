"""Standard OPD holds the lineage rules before a server is asked for anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from lopd_megatron.config import EngineConfig, RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.fingerprints import model_fingerprint
from lopd_megatron.inference.server import VllmServer
from lopd_megatron.lineage import Lineage
from lopd_megatron.online.inputs import check_online_inputs, read_prompts, sampling
from lopd_megatron.records import PROMPT_SCHEMA
from lopd_megatron.rollouts import shard_files
from tests.helpers.models import write_model_lineage


def model(folder: Path, value: float) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 2}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    save_file({"weight": np.full(3, value, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A student that was fine-tuned on answers of teacher A, and two prompts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher = model(tmp_path / "a", 1.0)
    student = model(tmp_path / "student", 0.0)
    write_model_lineage(student, Lineage(sft_teacher=model_fingerprint(teacher)))
    result = RunConfig(run_dir=str(tmp_path / "run"))
    result.model.student, result.model.teacher = str(student), str(teacher)
    rows = [
        {"prompt_id": name, "prompt_tokens": tokens, "answer": None, "source": None}
        for name, tokens in (("p", [1, 0]), ("q", [0]))
    ]
    table = pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)
    folder = result.paths.prompts
    folder.mkdir(parents=True)
    shard_files.write_shard(folder, 0, table, kind="prompts", num_shards=1, lineage=Lineage())
    return result


def test_the_teacher_of_the_sft_data_may_teach(config: RunConfig) -> None:
    inputs = check_online_inputs(config)
    assert inputs.lineage["teacher"]["origin"] == config.model.teacher
    assert inputs.lineage["sft_teacher"]["fingerprint"] == inputs.lineage["teacher"]["fingerprint"]
    assert inputs.model["origin"] == config.model.student


def test_another_teacher_is_refused_without_a_reason(config: RunConfig, tmp_path: Path) -> None:
    config.model.teacher = str(model(tmp_path / "b", 2.0))
    with pytest.raises(UserError, match="the SFT data was written by"):
        check_online_inputs(config)
    config.lineage.allow_mismatch = "measures what a second teacher costs"
    assert check_online_inputs(config).lineage["allow_mismatch"] == config.lineage.allow_mismatch


def test_a_checkpoint_of_other_prompts_or_teachers_does_not_fit(config: RunConfig, tmp_path: Path) -> None:
    first = check_online_inputs(config).dataset["fingerprint"]
    config.lineage.allow_mismatch = "a test"
    config.model.teacher = str(model(tmp_path / "b", 2.0))
    assert check_online_inputs(config).dataset["fingerprint"] != first


def test_prompts_come_in_the_order_of_their_shards(config: RunConfig) -> None:
    assert [(p.prompt_id, p.tokens) for p in read_prompts(config)] == [("p", [1, 0]), ("q", [0])]


def test_only_one_temperature_is_right(config: RunConfig) -> None:
    assert sampling(config).stop_token_ids == (2,)
    config.rollouts.temperature = 0.8
    with pytest.raises(UserError, match=r"rollouts.temperature=0.8"):
        sampling(config)


def test_a_server_of_no_model_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        VllmServer("teacher", str(tmp_path / "nowhere"), EngineConfig(), tmp_path / "log", task="score")
