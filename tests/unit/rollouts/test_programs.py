"""The stages as programs: what is wrong is said before an engine is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from lopd_megatron.config import EngineConfig, RunConfig
from lopd_megatron.errors import EXIT_DOCUMENTS_FAILED, UserError
from lopd_megatron.evaluation import evaluate
from lopd_megatron.rollouts import programs, shard_files
from lopd_megatron.rollouts.prompts import run_prompts
from lopd_megatron.rollouts.share import Share
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
    with pytest.raises(UserError, match=r"0 of 1 shards of prompts; run lopd prompts"):
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


def write_problems(path: Path, numbers: range, answer: str = "w9") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"w{number} w{number + 1}", "answer": answer} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def results(config: RunConfig, name: str = "student") -> tuple[dict, list[dict]]:
    """The summary and the rows of an evaluation."""
    evaluate.run_evaluation(config, [(name, config.model.student)], (0, 1))
    path = config.paths.evaluation / f"{name}.json"
    return json.loads(path.read_text()), pq.read_table(path.with_suffix(".parquet")).to_pylist()


def test_problem_files_of_one_name_are_kept_apart(config: RunConfig, tmp_path: Path) -> None:
    """Of unequal sizes, with one problem in both: each file has its own accuracy and its own draws."""
    config.evaluation.input = [
        write_problems(tmp_path / "aime24" / "test.jsonl", range(3, 6)),
        write_problems(tmp_path / "aime25" / "test.jsonl", range(5, 12)),
    ]
    summary, rows = results(config)
    assert (summary["num_problems"], summary["num_samples_per_problem"]) == (10, 3)
    files = summary["files"]
    assert {name: part["num_problems"] for name, part in files.items()} == {
        "aime24/test.jsonl": 3,
        "aime25/test.jsonl": 7,
    }
    for name, part in files.items():
        correct = [row["correct"] for row in rows if row["source"] == name]
        assert part["accuracy"] == pytest.approx(sum(correct) / len(correct))
    assert len({row["problem_id"] for row in rows}) == 10
    draws = {(row["source"], row["row"], row["sample_index"]): row["response_tokens"] for row in rows}
    first, second = ([draws[name, row, i] for i in range(3)] for name, row in zip(files, (2, 0), strict=True))
    assert first != second


def test_draws_do_not_depend_on_the_other_files(config: RunConfig, tmp_path: Path) -> None:
    files = [write_problems(tmp_path / f"{name}.jsonl", range(3, 9)) for name in ("a",)]
    config.evaluation.input = files
    _, alone = results(config)
    config.run_dir = str(tmp_path / "second")
    config.evaluation.input = [*files, write_problems(tmp_path / "b.jsonl", range(20, 30))]
    _, both = results(config)
    assert [row for row in both if row["source"] == "a.jsonl"] == alone


def test_answers_are_graded_again_without_an_engine(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config.evaluation.grader = "tiny"
    summary, _ = results(config)
    assert FakeVllmEngine.started == 1
    config.evaluation.grader = "exact"
    exact, rows = results(config)
    assert FakeVllmEngine.started == 1
    assert "it is graded again" in capsys.readouterr().err
    assert (summary["grader"]["name"], exact["grader"]["name"]) == ("tiny", "exact")
    assert all(row["extracted"] is not None for row in rows)
    path = config.paths.evaluation / "student.json"
    path.write_text("{")  # damaged: the answers are there
    assert results(config)[0] == exact
    assert FakeVllmEngine.started == 1
    config.evaluation.temperature = 0.5
    with pytest.raises(UserError, match="another sampling"):
        results(config)


def test_a_summary_of_other_answers_is_refused(config: RunConfig) -> None:
    results(config)
    shutil.rmtree(config.paths.evaluation / "student")
    config.evaluation.seed += 1
    with pytest.raises(
        UserError, match=r"student.json is of another model, other problems or other settings"
    ):
        results(config)


@pytest.mark.parametrize(
    ("row", "message"),
    [({"prompt": "w3"}, "line 1 has no answer"), ({"prompt": " ", "answer": "1"}, "line 1 has no question")],
)
def test_problems_that_cannot_be_graded(config: RunConfig, tmp_path: Path, row: dict, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    config.evaluation.input = [str(path)]
    with pytest.raises(UserError, match=message):
        results(config)
    path.write_text("")
    with pytest.raises(UserError, match="hold no problem"):
        results(config)
    config.evaluation.input = [str(path), str(path)]
    with pytest.raises(UserError, match="is given twice"):
        results(config)
