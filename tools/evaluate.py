"""Accuracy of models on problem files (`evaluation.input`), sampled with vLLM.

    python tools/evaluate.py --recipe recipes/tiny.py:sft [--model FOLDER ... --name NAME ...]

Without --model the exported model of the run. Writes `<run_dir>/evaluation/NAME.json` (accuracy, standard
error, counts) and `NAME.parquet` (every answer). Models of one architecture share one engine.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.errors import UserError, run_program
from lopd_megatron.files import atomic_path, write_json
from lopd_megatron.inference import evaluation, prompts
from lopd_megatron.inference.engine import VllmEngine
from lopd_megatron.inference.rollouts import stop_token_ids
from lopd_megatron.inference.stages import model_fingerprint
from lopd_megatron.progress import say
from lopd_megatron.records import PROBLEM_RESULT_SCHEMA


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--model", action="append", metavar="FOLDER", help="Hugging Face folder(s)")
    arguments.add_argument("--name", action="append", help="label of each model; default: the run's name")
    config, options = parse(arguments)
    models = options.model or [str(config.paths.hf)]
    names = options.name or ([config.name] if len(models) == 1 else [])
    if len(names) != len(models):
        raise UserError(f"{len(models)} --model need as many --name, got {len(names)}")
    section, folder = config.evaluation, config.paths.evaluation
    if options.dry_run:
        return dry_run(config, [*section.input, *models], [folder / f"{name}.json" for name in names])
    engine = None
    for model, name in zip(models, names, strict=True):
        tokenizer = prompts.load_tokenizer(model, trust_remote_code=config.model.trust_remote_code)
        template = prompts.Template(
            tokenizer, config.prompts.apply_chat_template, config.prompts.enable_thinking
        )
        problems = evaluation.read_problems(section, template)
        if engine is None or not engine.reload(model):
            if engine is not None:
                engine.close()
            engine = VllmEngine(model, section.engine, task="generate")
        rows = evaluation.evaluate(engine, tokenizer, problems, section, stop_token_ids(model))
        summary = {"name": name, "model": model_fingerprint(model), **evaluation.summarize(rows)}
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"{name}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=PROBLEM_RESULT_SCHEMA), temporary)
        write_json(folder / f"{name}.json", summary)
        say(f"{Path(model)}: accuracy {summary['accuracy']:.3f} ± {summary['standard_error']:.3f}")
    return 0


if __name__ == "__main__":
    run_program(main)
