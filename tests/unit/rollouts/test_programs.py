"""The stages as programs: what is wrong is said before an engine is started."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lopd_megatron.config import EngineConfig, RunConfig
from lopd_megatron.errors import EXIT_DOCUMENTS_FAILED, UserError
from lopd_megatron.evaluation import evaluate
from lopd_megatron.rollouts import programs, shard_files
from lopd_megatron.rollouts.programs import Share
from lopd_megatron.rollouts.prompts import run_prompts
from tests.unit.rollouts.fake_engine import EOS, FakeEngine


def save_model(folder: Path, seed: int, word: str = "w", positions: int = 64) -> str:
    """A folder with all that is read before an engine starts."""
    folder.mkdir()
    config = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 64,
        "vocab_size": 50,
        "max_position_embeddings": positions,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": np.full(3, seed, np.float32)}, folder / "model.safetensors")
    vocab = {"<unk>": 0, "#": 1, "<eos>": EOS, **{f"{word}{i}": i for i in range(3, 50)}}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


class FakeVllmEngine(FakeEngine):
    started = 0
    failing: dict = {}  # noqa: RUF012

    def __init__(self, model: str, config: EngineConfig, **options: object) -> None:
        super().__init__(failures=type(self).failing)
        type(self).started += 1

    def describe(self) -> dict:
        return {"engine": "fake"}

    def reload(self, model: str) -> bool:
        return True


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(programs, "VllmEngine", FakeVllmEngine)
    monkeypatch.setattr(evaluate, "VllmEngine", FakeVllmEngine)
    monkeypatch.setattr(FakeVllmEngine, "started", 0)
    monkeypatch.setattr(FakeVllmEngine, "failing", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = RunConfig(run_dir=str(tmp_path / "run"))
    config.model.student = save_model(tmp_path / "student", 1)
    config.model.teacher = save_model(tmp_path / "teacher", 2)
    problems = tmp_path / "p.jsonl"
    problems.write_text(
        "".join(json.dumps({"prompt": f"w{i} w{i + 1}", "answer": f"w{i}"}) + "\n" for i in range(3, 23))
    )
    config.prompts.input = config.evaluation.input = [str(problems)]
    config.prompts.apply_chat_template = False
    config.prompts.num_shards = 2
    config.prompts.max_prompt_tokens = 8
    for section in (config.rollouts, config.scores, config.evaluation):
        section.engine = EngineConfig(max_model_len=32, max_num_seqs=4, max_num_batched_tokens=256)
    config.rollouts.max_response_tokens = config.evaluation.max_response_tokens = 6
    config.evaluation.grader = "tiny"
    config.evaluation.num_samples_per_problem = 3
    config.check()
    return config


def test_stages_in_order_and_again(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_prompts(config) == 0
    assert programs.run_rollouts(config, Share()) == 0
    assert programs.run_scoring(config, Share()) == 0
    manifests = shard_files.complete_manifests(config.paths.scores, "scores")
    lineage = shard_files.lineage_of(config.paths.scores, manifests)
    assert lineage.generator is not None
    assert lineage.teacher is not None
    assert lineage.generator["origin"] == config.model.student
    assert lineage.teacher["origin"] == config.model.teacher
    assert lineage.sampling["seed"] == config.rollouts.seed
    assert lineage.sampling["stop_token_ids"] == [EOS]
    assert lineage.engine["scores"]["scoring_path"] == "native"
    assert FakeVllmEngine.started == 2
    assert programs.run_rollouts(config, Share()) == programs.run_scoring(config, Share()) == 0
    assert FakeVllmEngine.started == 2  # what is complete starts no engine
    assert capsys.readouterr().err.count("is complete") == 2


def test_failed_documents_set_the_exit_code_until_they_are_accepted(config: RunConfig) -> None:
    run_prompts(config)
    FakeVllmEngine.failing = {(1, 0): 9}
    assert programs.run_rollouts(config, Share()) == EXIT_DOCUMENTS_FAILED
    assert programs.run_rollouts(config, Share()) == EXIT_DOCUMENTS_FAILED
    assert programs.run_rollouts(config, Share(max_failed=1)) == 0
    shard_files.manifest_path(config.paths.rollouts, 1).unlink()
    FakeVllmEngine.failing = {}
    assert programs.run_rollouts(config, Share()) == 0


def test_stages_ask_for_what_they_read(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"0 of 1 shards of prompts; run tools/prepare_prompts.py"):
        programs.run_rollouts(config, Share())
    config.model.teacher = "nowhere"
    with pytest.raises(UserError, match=r"model.teacher='nowhere' is not a Hugging Face folder"):
        programs.run_scoring(config, Share())
    assert FakeVllmEngine.started == 0


def test_a_teacher_with_another_vocabulary(config: RunConfig, tmp_path: Path) -> None:
    run_prompts(config)
    programs.run_rollouts(config, Share())
    started = FakeVllmEngine.started
    config.model.teacher = save_model(tmp_path / "other", 3, word="v")
    with pytest.raises(UserError, match=r"tokenizer .*vocabulary"):
        programs.run_scoring(config, Share())
    assert FakeVllmEngine.started == started
    config.lineage.allow_mismatch = "a test"
    assert programs.run_scoring(config, Share()) == 0
    manifests = shard_files.complete_manifests(config.paths.scores, "scores")
    assert manifests[0]["lineage"]["allow_mismatch"] == "a test"


def test_rollouts_of_another_student_are_not_scored(config: RunConfig, tmp_path: Path) -> None:
    run_prompts(config)
    programs.run_rollouts(config, Share())
    config.model.student = save_model(tmp_path / "later", 4)
    with pytest.raises(UserError, match="the rollouts were sampled by"):
        programs.run_scoring(config, Share())


def test_documents_over_the_context(config: RunConfig) -> None:
    run_prompts(config)
    config.rollouts.engine.max_model_len = 7
    with pytest.raises(UserError, match=r"= 8 tokens is more than rollouts.engine.max_model_len=7"):
        programs.run_rollouts(config, Share())
    config.rollouts.engine.max_model_len = 32
    programs.run_rollouts(config, Share())
    config.scores.engine.max_model_len = 4
    with pytest.raises(UserError, match="the longest rollout = 8 tokens"):
        programs.run_scoring(config, Share())
    config.evaluation.engine.max_model_len = 7
    with pytest.raises(UserError, match=r"p.jsonl line 1 has 2 tokens; .* leaves 1"):
        evaluate.run_evaluation(config, [("x", config.model.student)], (0, 1))


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0"])
def test_worker_option(text: str) -> None:
    with pytest.raises(UserError, match="is not I/N"):
        Share.parse(text)
    assert Share.parse("3/8", 2) == Share(3, 8, 2)


def test_evaluation_of_two_models(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    models = [("student", config.model.student), ("teacher", config.model.teacher)]
    assert evaluate.run_evaluation(config, models, (0, 1)) == 0
    assert FakeVllmEngine.started == 1
    for name, _ in models:
        summary = json.loads((config.paths.evaluation / f"{name}.json").read_text())
        assert summary["num_problems"] == 20
        assert summary["num_samples_per_problem"] == 3
        assert {"pass@1", "avg@3", "maj@3", "pass@3"} <= summary["metrics"].keys()
    assert evaluate.run_evaluation(config, models, (0, 1)) == 0
    assert FakeVllmEngine.started == 1
    with pytest.raises(UserError, match="another generator"):
        evaluate.run_evaluation(config, [("student", config.model.teacher)], (0, 1))
