"""Sampled answers of models to problems, graded.

Problems and answers are shards, as everywhere: an evaluation that was killed goes on, and several workers can
share one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lopd_megatron.config import EngineConfig, EvaluationConfig, RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.evaluation.accuracy import summarize
from lopd_megatron.evaluation.grading import GRADERS, SUFFIXES, grader_identity
from lopd_megatron.files import atomic_path, write_json
from lopd_megatron.fingerprints import model_fingerprint, tokenizer_fingerprint
from lopd_megatron.inference.engine import VllmEngine
from lopd_megatron.inference.requests import Sampling
from lopd_megatron.lineage import Lineage, parse_lineage
from lopd_megatron.progress import log_line, progress
from lopd_megatron.records import PROBLEM_RESULT_SCHEMA, PROMPT_SCHEMA, ROLLOUT_SCHEMA
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.input_files import short_names
from lopd_megatron.rollouts.prompts import input_lineage, prompt_id
from lopd_megatron.rollouts.rollout_stage import RolloutJob, stop_token_ids
from lopd_megatron.rollouts.sources import read_rows
from lopd_megatron.rollouts.templates import Template, load_tokenizer
from lopd_megatron.rollouts.worker import Worker

ANSWERS_PER_SHARD = 1024


def run_evaluation(config: RunConfig, models: Sequence[tuple[str, str]], worker: tuple[int, int]) -> int:
    """Evaluate (name, folder) models one after the other. Models of one architecture share an engine."""
    engine: VllmEngine | None = None
    for name, model in models:
        evaluation = _Evaluation(config, name, model)
        if evaluation.is_done():
            continue
        if evaluation.is_answered():
            evaluation.grade()
            continue
        if engine is None or not engine.reload(model):
            if engine is not None:
                engine.close()
            log_line(f"evaluation of {name}: starting vLLM")
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
        self.rows = rows = read_problems(section, template)
        stop = stop_token_ids(model)
        self.sampling = Sampling(section.temperature, section.top_p, section.max_response_tokens, stop)
        self.lineage = Lineage(
            generator=model_fingerprint(model),
            tokenizer=tokenizer_fingerprint(model),
            prompts={
                "input": input_lineage(section.input),
                "suffix": SUFFIXES[section.grader],
                "apply_chat_template": prompts.apply_chat_template,
                "enable_thinking": prompts.enable_thinking,
            },
            sampling={
                **section.model_dump(mode="json", exclude={"engine", "input", "grader"}),
                "stop_token_ids": list(stop),
            },
        )
        self.num_shards = min(-(-len(rows) * section.num_samples_per_problem // ANSWERS_PER_SHARD), len(rows))
        shard_files.refuse_other_lineage(self.problems, self.num_shards, self.lineage)
        for index in range(self.num_shards):
            if shard_files.read_manifest(self.problems, index) is None:
                table = pa.Table.from_pylist(rows[index :: self.num_shards], schema=PROMPT_SCHEMA)
                shard_files.write_shard(
                    self.problems,
                    index,
                    table,
                    kind="prompts",
                    num_shards=self.num_shards,
                    lineage=self.lineage,
                )

    def is_done(self) -> bool:
        """Whether the summary is that of these answers and this grader."""
        try:
            summary = json.loads(self.summary_path.read_text())
            lineage, grader = parse_lineage(summary["lineage"], self.summary_path), summary["grader"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):  # damaged, or of a version that did not name its grader
            return False
        if not lineage.same_content(self.lineage):
            raise UserError(
                f"{self.summary_path} is of another model, other problems or other settings; "
                "delete it, or give another --name"
            )
        if grader != grader_identity(self.section.grader):
            log_line(f"{self.summary_path} was graded by {grader}; it is graded again")
            return False
        log_line(f"{self.summary_path} is there already")
        return True

    def is_answered(self) -> bool:
        """Whether all answers are there, so that only grades are missing."""
        found = shard_files.manifests(self.answers, self.num_shards)
        shard_files.refuse_other_lineage(self.answers, self.num_shards, self.lineage, but=["engine"])
        return len(found) == self.num_shards and not any(manifest["failed"] for manifest in found)

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
        """Grade the answers that are stored; write every grade and the summary, of all files and of each."""
        shard_files.complete_manifests(self.answers, "rollouts")
        rows = []
        total = len(self.rows) * self.section.num_samples_per_problem
        with progress(total, f"grades of {self.name}", "answer") as bar:
            for index in range(self.num_shards):
                for answer in shard_files.read_table(self.answers, index, ROLLOUT_SCHEMA).to_pylist():
                    rows.append(self._graded(answer))
                    bar.update(1)
        rows.sort(key=lambda row: (row["source"], row["row"], row["sample_index"]))
        sources = dict.fromkeys(row["source"] for row in self.rows)
        files = {name: summarize(row for row in rows if row["source"] == name) for name in sources}
        summary = {
            "name": self.name,
            **summarize(rows),
            "files": files,
            "grader": grader_identity(self.section.grader),
            "lineage": self.lineage.model_dump(),
        }
        with atomic_path(self.summary_path.with_suffix(".parquet")) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=PROBLEM_RESULT_SCHEMA), temporary)
        write_json(self.summary_path, summary)
        for name, part in [*(files.items() if len(files) > 1 else ()), ("all problems", summary)]:
            log_line(f"{self.name}: {name}: accuracy {part['accuracy']:.4f} ± {part['standard_error']:.4f}")

    def _graded(self, answer: dict[str, Any]) -> dict[str, Any]:
        text = self.tokenizer.decode(answer["response_tokens"], skip_special_tokens=True)
        problem = self._problem[answer["prompt_id"]]
        grade = GRADERS[self.section.grader]
        extracted, correct = grade(text, answer["finish_reason"], problem["answer"])
        kept = {name: answer[name] for name in ("sample_index", "response_tokens", "finish_reason")}
        known = {name: problem[name] for name in ("source", "row", "answer")}
        return kept | known | {"problem_id": answer["prompt_id"], "extracted": extracted, "correct": correct}

    @cached_property
    def _problem(self) -> dict[str, dict[str, Any]]:
        return {row["prompt_id"]: row for row in self.rows}


def read_problems(config: EvaluationConfig, template: Template) -> list[dict[str, Any]]:
    """Rows of PROMPT_SCHEMA and `row`, the row in the file; a problem without an answer is refused.

    `prompt_id` is a hash of the content, with a number where a problem is there again: seeds follow from it,
    so a problem has the same draws in whatever files it stands, and no two problems share theirs.
    """
    if not config.input:
        raise UserError("evaluation.input is empty; set it to jsonl files with questions and answers")
    rows = []
    times: Counter[str] = Counter()
    room = config.engine.max_model_len - config.max_response_tokens
    for source, path in zip(short_names(config.input), config.input, strict=True):
        for number, row in enumerate(read_rows(path)):
            if row.answer is None or row.is_empty:
                lacks = "answer" if row.answer is None else "question"
                raise UserError(f"{row.place} has no {lacks}; evaluation needs one for every problem")
            tokens = template.row_tokens(row, SUFFIXES[config.grader])
            if len(tokens) > room:
                raise UserError(
                    f"{row.place} has {len(tokens)} tokens; evaluation.engine.max_model_len − "
                    f"evaluation.max_response_tokens leaves {room}; raise the former"
                )
            name = prompt_id(tokens)
            times[name] += 1
            name = f"{name}-{times[name]}" if times[name] > 1 else name
            values = (name, tokens, row.answer, source)
            rows.append({**dict(zip(PROMPT_SCHEMA.names, values, strict=True)), "row": number})
    if not rows:
        raise UserError(f"{', '.join(config.input)} hold no problem; give files with questions and answers")
    return rows
