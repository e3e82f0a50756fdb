"""Sampled answers of models to problems, graded.

Problems and answers are shards, as everywhere: an evaluation that was killed goes on, and several workers can
share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lopd_megatron.config import EngineConfig, EvaluationConfig, RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.evaluation.accuracy import summarize
from lopd_megatron.evaluation.grading import GRADERS, SUFFIXES
from lopd_megatron.files import atomic_path, write_json
from lopd_megatron.fingerprints import model_fingerprint, tokenizer_fingerprint
from lopd_megatron.inference.engine import VllmEngine
from lopd_megatron.inference.requests import Sampling
from lopd_megatron.lineage import Lineage
from lopd_megatron.progress import say
from lopd_megatron.records import PROBLEM_RESULT_SCHEMA, PROMPT_SCHEMA, ROLLOUT_SCHEMA
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.prompts import Template, input_hash, load_tokenizer
from lopd_megatron.rollouts.rollout_stage import RolloutJob, stop_token_ids
from lopd_megatron.rollouts.sources import read_rows
from lopd_megatron.rollouts.worker import Worker

ANSWERS_PER_SHARD = 1024


def run_evaluation(config: RunConfig, models: Sequence[tuple[str, str]], worker: tuple[int, int]) -> int:
    """Evaluate (name, folder) models one after the other. Models of one architecture share an engine."""
    engine: VllmEngine | None = None
    for name, model in models:
        evaluation = _Evaluation(config, name, model)
        if evaluation.is_done():
            continue
        if engine is None or not engine.reload(model):
            if engine is not None:
                engine.close()
            say(f"evaluation of {name}: starting vLLM")
            engine = evaluation.open_engine(config.evaluation.engine)
        engine = evaluation.sample(engine, worker)
        evaluation.grade()
    if engine is not None:
        engine.close()
    return 0


class _Evaluation:
    """One model on all problem files, below `evaluation/<name>/`, summed up in `evaluation/<name>.json`."""

    def __init__(self, config: RunConfig, name: str, model: str) -> None:
        section = config.evaluation
        self.section, self.name, self.model = section, name, model
        self.summary_path = config.paths.evaluation / f"{name}.json"
        self.problems = config.paths.evaluation / name / "problems"
        self.answers = config.paths.evaluation / name / "answers"
        self.trust_remote_code = config.model.trust_remote_code
        self.tokenizer = load_tokenizer(model, trust_remote_code=self.trust_remote_code)
        prompts = config.prompts
        template = Template(self.tokenizer, prompts.apply_chat_template, prompts.enable_thinking)
        rows = read_problems(section, template)
        stop = stop_token_ids(model)
        self.sampling = Sampling(section.temperature, section.top_p, section.max_response_tokens, stop)
        self.lineage = Lineage(
            generator=model_fingerprint(model),
            tokenizer=tokenizer_fingerprint(model),
            prompts={
                "input": {Path(path).name: input_hash(path) for path in section.input},
                "apply_chat_template": prompts.apply_chat_template,
                "enable_thinking": prompts.enable_thinking,
            },
            sampling={
                **section.model_dump(mode="json", exclude={"engine", "input"}),
                "stop_token_ids": list(stop),
            },
        )
        self.num_shards = min(-(-len(rows) * section.num_samples_per_problem // ANSWERS_PER_SHARD), len(rows))
        for index in range(self.num_shards):
            if shard_files.read_manifest(self.problems, index) is None:
                self.problems.mkdir(parents=True, exist_ok=True)
                table = pa.Table.from_pylist(rows[index :: self.num_shards], schema=PROMPT_SCHEMA)
                shard_files.write_shard(
                    self.problems,
                    index,
                    table,
                    kind="prompts",
                    num_shards=self.num_shards,
                    lineage=self.lineage,
                )
        shard_files.refuse_other_lineage(self.problems, self.num_shards, self.lineage)

    def is_done(self) -> bool:
        if self.summary_path.exists():
            say(f"{self.summary_path} is there already")
        return self.summary_path.exists()

    def open_engine(self, config: EngineConfig) -> VllmEngine:
        return VllmEngine(self.model, config, task="generate", trust_remote_code=self.trust_remote_code)

    def sample(self, engine: VllmEngine, worker: tuple[int, int]) -> VllmEngine:
        """Make all answers that are missing; returns the engine that is open at the end."""
        lineage = self.lineage.model_copy(update={"engine": {"rollouts": engine.describe()}})
        section = self.section
        stage = RolloutJob(self.sampling, section.num_samples_per_problem, section.seed, lineage)
        work = Worker(stage, self.problems, self.answers, self.num_shards, worker=worker)
        failed = work.run(engine, section.engine, self.open_engine)
        if failed:
            raise UserError(
                f"{failed} answers failed, see {self.answers}/failed-*.json; accuracy would be wrong"
            )
        assert isinstance(work.engine, VllmEngine)
        return work.engine

    def grade(self) -> None:
        rows = []
        for index in range(self.num_shards):
            rows += self._graded(shard_files.read_table(self.answers, index, ROLLOUT_SCHEMA).to_pylist())
        rows.sort(key=lambda row: (row["problem_id"], row["sample_index"]))
        summary = {"name": self.name, **summarize(rows), "lineage": self.lineage.model_dump()}
        with atomic_path(self.summary_path.with_suffix(".parquet")) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=PROBLEM_RESULT_SCHEMA), temporary)
        write_json(self.summary_path, summary)
        say(f"{self.name}: accuracy {summary['accuracy']:.4f} ± {summary['standard_error']:.4f}")

    def _graded(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        grade = GRADERS[self.section.grader]
        rows = []
        for answer in answers:
            text = self.tokenizer.decode(answer["response_tokens"], skip_special_tokens=True)
            extracted, correct = grade(text, answer["finish_reason"], answer["answer"])
            kept = ("sample_index", "response_tokens", "finish_reason", "answer")
            rows.append(
                {key: answer[key] for key in kept}
                | {"problem_id": answer["prompt_id"], "extracted": extracted, "correct": correct}
            )
        return rows


def read_problems(config: EvaluationConfig, template: Template) -> list[dict[str, Any]]:
    """Rows of PROMPT_SCHEMA, `prompt_id` being "file/row"; a problem without an answer is refused."""
    if not config.input:
        raise UserError("evaluation.input is empty; set it to jsonl files with questions and answers")
    rows = []
    room = config.engine.max_model_len - config.max_response_tokens
    for path in config.input:
        for number, row in enumerate(read_rows(path)):
            if row.answer is None:
                raise UserError(f"{path} row {number} has no answer; evaluation needs one for every problem")
            tokens = template.tokens(row.content, SUFFIXES[config.grader])
            if len(tokens) > room:
                raise UserError(
                    f"{path} row {number} has {len(tokens)} tokens; evaluation.engine.max_model_len − "
                    f"evaluation.max_response_tokens leaves {room}; raise the former"
                )
            name = f"{Path(path).stem}/{number}"
            rows.append(
                {"prompt_id": name, "prompt_tokens": tokens, "answer": row.answer, "source": row.source}
            )
    return rows
