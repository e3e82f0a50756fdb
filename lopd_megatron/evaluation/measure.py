"""How far a model is from the teacher on responses of its own: a KL that no replayed token can flatter.

    lopd measure --recipe recipes/tiny.py:lightning_opd [--prompts 128] [--samples 1] [--input FILE ...]

The student that training started from (`before`) and the exported one (`after`), or every --model FOLDER with
its --name, each sample new responses to held-out prompts at temperature 1. Teacher and model score those
tokens with their top-k. Writes `<run_dir>/measure/NAME.json`, which the report shows; prompts, rollouts and
scores lie beside it as shards, so that a kill loses little: start the same command again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.config import RunConfig
from lopd_megatron.data.held_out import held_out_prefixes
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError, run_program
from lopd_megatron.evaluation.divergence import measured
from lopd_megatron.files import write_json
from lopd_megatron.fingerprints import model_fingerprint, tokenizer_fingerprint
from lopd_megatron.lineage import Lineage
from lopd_megatron.progress import log_line
from lopd_megatron.records import SCORE_SCHEMA
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.programs import Share, run_rollouts, run_scoring, score_with
from lopd_megatron.rollouts.prompts import collect, prompt_id, write_prompts
from lopd_megatron.rollouts.templates import Template, load_tokenizer

TOPK = 8
"""Tokens that both models name at every position where `scores.topk` is 0."""
REASON = "a measurement; nothing is trained from it"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--model", action="append", metavar="FOLDER", help="Hugging Face folder; repeatable"
    )
    arguments.add_argument("--name", action="append", help="label of each --model")
    arguments.add_argument("--prompts", type=int, default=128, help="at most so many held-out prompts")
    arguments.add_argument("--samples", type=int, default=1, help="responses to each prompt")
    arguments.add_argument("--input", nargs="+", metavar="FILE", help="prompt files instead of held-out ones")
    config, options = parse(arguments, argv)
    models = dict(zip(options.name or (), options.model or (), strict=False))
    if len(models) != len(options.model or ()):
        raise UserError(f"{len(options.model)} --model need as many different --name, got {len(models)}")
    if not models:
        models = {"before": config.model.student}
        if (config.paths.hf / "config.json").is_file():
            models["after"] = str(config.paths.hf)
    folder = config.paths.measure
    if options.dry_run:
        read = [*models.values(), config.model.teacher, *(options.input or held_out_prefixes(config))]
        return dry_run(config, read, [folder / f"{name}.json" for name in models])
    rows = read_prompts(config, options.input, options.prompts)
    for name, model in models.items():
        measure(config, name, model, rows, options.samples)
    return 0


def read_prompts(config: RunConfig, files: Sequence[str] | None, count: int) -> list[dict[str, Any]]:
    """Rows of PROMPT_SCHEMA: of `files`, or the prompts of the held-out data; the same ones every time."""
    if files:
        section = config.prompts.model_copy(
            update={"input": list(files), "contamination_files": [], "max_prompts": count}
        )
        tokenizer = load_tokenizer(config.model.student, trust_remote_code=config.model.trust_remote_code)
        template = Template(tokenizer, section.apply_chat_template, section.enable_thinking)
        return collect(section, template)[0]
    prefixes = held_out_prefixes(config)
    if not prefixes:
        raise UserError(
            f"{config.run_dir} has no held-out prompts (data.valid_prefixes is empty and there is no "
            "dataset/valid); name prompt files with --input FILE"
        )
    dataset = open_dataset(prefixes)
    found: dict[str, dict[str, Any]] = {}
    for index in range(len(dataset)):
        document = dataset.document(index)
        tokens = document["tokens"][: int(np.argmax(document["loss_mask"] != 0))]
        name = prompt_id(tokens)
        found[name] = {"prompt_id": name, "prompt_tokens": tokens, "answer": None, "source": None}
    return [found[name] for name in sorted(found)[:count]]


def measure(config: RunConfig, name: str, model: str, prompts: list[dict[str, Any]], samples: int) -> None:
    """One model; nothing to do where its summary is of these weights, this teacher and these prompts."""
    own = measuring_config(config, model, samples)
    rollouts, scores = own.rollouts, own.scores
    described = {
        "prompts": [row["prompt_id"] for row in prompts],
        "sampling": rollouts.model_dump(mode="json", exclude={"engine"}),
        "topk": scores.topk,
        "model": model_fingerprint(model)["fingerprint"],
        "teacher": model_fingerprint(own.model.teacher)["fingerprint"],
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
    summary = config.paths.measure / f"{name}.json"
    if summary.is_file() and json.loads(summary.read_text())["key"] == key:
        log_line(f"{summary} is there already")
        return
    own.run_dir = str(config.paths.measure / f"{name}-{key}")
    paths = own.paths
    if not shard_files.manifests(paths.prompts, 1):
        write_prompts(paths.prompts, prompts, 1, Lineage(tokenizer=tokenizer_fingerprint(model)))
    log_line(f"measure {name}: {len(prompts)} prompts, {samples} responses each, of {model}")
    by_model = paths.run_dir / "own_scores"
    share = Share()
    codes = [run_rollouts(own, share), run_scoring(own, share), score_with(own, model, by_model, share)]
    if any(codes):
        raise UserError(f"{name}: documents failed, see {paths.run_dir}; the result would be wrong")
    found = measured(rows_of(paths.scores), rows_of(by_model), scores.topk)
    write_json(summary, {"name": name, "model": model, "key": key, **found.summary()})
    log_line(f"{name}: {found.text()}")


def measuring_config(config: RunConfig, model: str, samples: int) -> RunConfig:
    """The run's settings for new responses of `model` at temperature 1, where a sampled KL is unbiased."""
    own = config.model_copy(deep=True)
    own.model.student = model
    own.rollouts.generator = "student"
    own.rollouts.num_samples_per_prompt = samples
    own.rollouts.temperature = own.rollouts.top_p = 1.0
    own.scores.topk = config.scores.topk or TOPK
    own.loss.objective = "lightning_opd"  # which rules of lineage hold
    own.lineage.allow_mismatch = config.lineage.allow_mismatch or REASON
    return own


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of the finished shards in a folder."""
    manifests = shard_files.complete_manifests(folder, "scores")
    tables = [shard_files.read_table(folder, index, SCORE_SCHEMA) for index in range(len(manifests))]
    return [row for table in tables for row in table.to_pylist()]


if __name__ == "__main__":
    run_program(main)
