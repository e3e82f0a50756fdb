"""A run folder with every stage done, in the real formats; only the numbers are invented."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lopd_megatron.config import Paths
from lopd_megatron.data.alignment import AlignmentReport, Sample
from lopd_megatron.data.build_dataset import build_dataset
from lopd_megatron.data.filters import Filters
from lopd_megatron.evaluation.accuracy import summarize
from lopd_megatron.evaluation.divergence import Measured
from lopd_megatron.files import write_json
from lopd_megatron.fingerprints import Fingerprint
from lopd_megatron.lineage import Lineage
from lopd_megatron.recipes import tiny, tiny_task
from lopd_megatron.records import PROMPT_SCHEMA, ROLLOUT_SCHEMA, SCORE_SCHEMA
from lopd_megatron.rollouts.shard_files import Kind, write_shard
from lopd_megatron.train.held_out import Validation
from lopd_megatron.train.metrics import JsonLines
from tests.helpers.models import write_model_lineage

ITERATIONS = 60
ROLLOUTS = 48


def sample_run(root: Path, *, seed: int = 0) -> Path:
    """`root/lightning_opd`, with the SFT run it started from, its teacher and a re-scored run beside it."""
    rng = np.random.default_rng(seed)
    config = tiny.lightning_opd(str(root))
    config.train.train_iters = ITERATIONS
    run = Paths(Path(config.run_dir))
    tiny_task.save_tokenizer(run.hf)
    teacher, base = _model(root, "teacher"), _model(root, "base")
    start = _model(root, "sft")
    data = _lineage(run.hf, generator=start, teacher=teacher, sft_teacher=teacher)
    _write_prompts(run, data)
    rollouts = _rollouts(rng, ROLLOUTS, spread=1.2)
    _write_shards(run, rollouts, data)
    build_dataset(
        run.scores,
        run.dataset_prefix,
        filters=Filters(1024),
        special_ids={2},
        proof=_proof,
        proof_documents=16,
    )
    config.dump(run.config)
    lines = "".join(json.dumps(line) + "\n" for line in metric_lines())
    run.metrics.write_text(lines)
    write_model_lineage(run.hf, Lineage(start=start, teacher=teacher, tokenizer=data.tokenizer))
    write_model_lineage(root / "sft" / "hf", Lineage(start=base, sft_teacher=teacher))
    for name, accuracy in (("teacher", 0.96), ("sft", 0.55), ("lightning_opd", 0.86)):
        _write_evaluation(root / name / "evaluation" / f"{name}.json", accuracy, rng)
    after = Paths(root / "after")
    own = {"kind": "model", "fingerprint": "d" * 64, "origin": str(run.hf)}
    _write_shards(after, _rollouts(rng, 8, spread=0.3), data.model_copy(update={"generator": own}))
    _write_signals(run, rng)
    jobs = {"rollouts": 61.0, "scores": 24.0, "train": 98.0, "dataset": 7.0}
    write_json(root / "seconds.json", {f"lightning_opd-{job}": value for job, value in jobs.items()})
    return run.run_dir


def metric_lines(count: int = ITERATIONS) -> list[dict[str, Any]]:
    """What training logs: every name that `LogHook` writes for a dataset with both log-probs."""
    rng = np.random.default_rng(1)
    lines = []
    for i in range(1, count + 1):
        fall = math.exp(-i / 18) + 0.02 * rng.standard_normal()
        kl, drift = 0.07 + 0.25 * fall, 0.12 * (1 - math.exp(-i / 20))
        line = {
            "iteration": i,
            "student_logprobs": -0.3 - drift,
            "entropy": 0.12 + 0.1 * fall,
            "teacher_logprobs": -0.55,
            "log_ratio_mean": kl,
            "k2": 0.3 + 1.4 * fall,
            "clip_fraction": 0.03 + 0.05 * fall,
            "drift_kl": drift,
            "loss": -0.02 - 0.03 * fall,
            "num_tokens": 2300.0,
            "importance_ratio_mean": 1.0 - 0.01 * drift,
            "importance_ratio_std": 0.1 + 3 * drift,
            "effective_sample_fraction": 1 / (1 + (0.1 + 3 * drift) ** 2),
            "consumed_train_samples": 64 * i,
            "grad_norm": 0.4 + 0.5 * fall,
            "lr": 1e-3 * (1 + math.cos(math.pi * i / count)) / 2,
            "iteration_time_ms": 400 + 20 * rng.standard_normal(),
            "tokens_per_second_per_gpu": 8800 + 300 * rng.standard_normal(),
            "peak_memory_gib": 0.97,
        }
        for decile in range(10):
            bump = math.sin(math.pi * (decile + 0.5) / 10)
            line[f"teacher_student_gap_decile_{decile}"] = -kl * (0.3 + bump)
            line[f"drift_kl_decile_{decile}"] = drift * (0.3 + bump)
        if i % 10 == 0:
            line["valid_k2"] = 0.4 + 1.4 * fall
        lines.append(line)
    return lines


def _write_signals(run: Paths, rng: np.random.Generator) -> None:
    """What validation and `measure` leave: a k2 that falls, and fresh responses nearer to the teacher."""
    tokens = rng.integers(20, 60, 32).astype(float)
    level = rng.normal(0.5, 0.1, 32)
    log = JsonLines(run.validation, -1)
    for iteration in range(0, ITERATIONS + 1, 10):
        values = level + 1.4 * math.exp(-iteration / 18) + rng.normal(0, 0.01, 32)
        log.write(
            iteration, Validation(iteration, "k2", values * tokens, tokens, 0.5 * values * tokens).line()
        )
    log.close()
    run.measure.mkdir()
    for name, kl, stopped in (("before", 0.32, 30.0), ("after", 0.08, 31.0)):
        sampled = (kl + rng.normal(0, 0.05, 32)) * tokens
        ones = np.ones(32)
        stops = np.where(np.arange(32) < stopped, 1.0, 0.0)
        found = Measured(8, tokens, sampled, sampled, 0.8 * kl * tokens, ones, stops, -0.2)
        write_json(run.measure / f"{name}.json", {"name": name, "key": name, **found.summary()})


def _model(root: Path, name: str) -> Fingerprint:
    return {"kind": "model", "fingerprint": f"{name.encode().hex():0<64}", "origin": str(root / name / "hf")}


def _lineage(folder: Path, **models: Fingerprint) -> Lineage:
    tokenizer = {
        "kind": "tokenizer",
        "fingerprint": "e" * 64,
        "origin": str(folder),
        "vocabulary": "f" * 64,
        "chat_template": "0" * 64,
    }
    return Lineage.model_validate({"tokenizer": tokenizer, **models})


def _rollouts(rng: np.random.Generator, count: int, *, spread: float) -> list[dict[str, Any]]:
    problems = tiny_task.sample_problems(count, rng, set())
    responses = tiny_task.solution_tokens(problems, 0.7, rng)
    rows = []
    for i, (prompt, response) in enumerate(zip(tiny_task.prompt_tokens(problems), responses, strict=True)):
        size = len(response)
        rollout = -rng.exponential(0.15, size)
        teacher = rollout - spread * rng.exponential(0.4, size) * (rng.random(size) < 0.3)
        rows.append(
            {
                "document_id": f"problem{i:04d}/0",
                "prompt_id": f"problem{i:04d}",
                "sample_index": 0,
                "prompt_tokens": prompt.tolist(),
                "response_tokens": response.tolist(),
                "rollout_logprobs": rollout.tolist(),
                "teacher_logprobs": np.minimum(teacher + 0.05, 0.0).tolist(),
                "finish_reason": "length" if i % 8 == 7 else "stop",
                "answer": "7",
                "teacher_topk_ids": [],
                "teacher_topk_logprobs": [],
            }
        )
    return rows


def _write_prompts(run: Paths, lineage: Lineage) -> None:
    rows = [{"prompt_id": f"problem{i}", "prompt_tokens": [1, 2], "answer": "7"} for i in range(ROLLOUTS)]
    table = pa.Table.from_pylist(rows, PROMPT_SCHEMA)
    run.prompts.mkdir(parents=True)
    write_shard(run.prompts, 0, table, kind="prompts", num_shards=1, lineage=lineage)
    counts = {"read": 52, "kept": ROLLOUTS, "too_long": 1, "duplicate": 2, "contaminated": 1}
    write_json(run.prompts / "counts.json", counts)


def _write_shards(run: Paths, rows: list[dict[str, Any]], lineage: Lineage) -> None:
    stages: list[tuple[Path, pa.Schema, Kind]] = [
        (run.rollouts, ROLLOUT_SCHEMA, "rollouts"),
        (run.scores, SCORE_SCHEMA, "scores"),
    ]
    for folder, schema, kind in stages:
        folder.mkdir(parents=True)
        table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema)
        write_shard(folder, 0, table, kind=kind, num_shards=1, lineage=lineage)
        # Two shards, a kill, a third one by a new process.
        lines = [{"seconds": seconds, "tokens": 2400, "tokens_per_second": 600.0} for seconds in (4, 10, 3)]
        (folder / "metrics-0-of-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _proof(samples: list[Sample]) -> AlignmentReport:
    return AlignmentReport(len(samples), 700, 2.1e-7, 1.4e-6, 3, 21, 4e-7, 1e-3, "")


def _write_evaluation(path: Path, accuracy: float, rng: np.random.Generator) -> None:
    rows = [
        {
            "problem_id": f"test/{i}",
            "sample_index": 0,
            "response_tokens": [1] * 30,
            "finish_reason": "stop",
            "extracted": "7",
            "answer": "7",
            "correct": bool(rng.random() < accuracy),
        }
        for i in range(256)
    ]
    lineage = Lineage(prompts={"input": {"test.jsonl": "a" * 64}}, sampling={"temperature": 0.0})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"name": path.stem, **summarize(rows), "lineage": lineage.model_dump()})
