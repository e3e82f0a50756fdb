"""Accuracy of models on problem files (`evaluation.input`), sampled with vLLM.

    lopd evaluate recipes/tiny.py:sft [--model FOLDER --name NAME]... [--worker 0/4]

Without --model the exported model of the run, named as the run. Writes `<run_dir>/evaluation/NAME.json`
(accuracy, standard errors, counts) and `NAME.parquet` (every answer). Models of one architecture share one
engine. Problems whose answer is a program are not supported: running them needs a sandbox.
"""

from __future__ import annotations

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.errors import UserError
from lopd_megatron.rollouts.share import Share


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--model", action="append", metavar="FOLDER", help="Hugging Face folder; repeatable"
    )
    arguments.add_argument("--name", action="append", help="label of each --model")
    arguments.add_argument("--worker", default="0/1", metavar="I/N", help="which of N workers this is")
    config, options = parse(arguments)
    models = options.model or [str(config.paths.hf)]
    names = options.name or ([config.name] if len(models) == 1 else [])
    if len(set(names)) != len(models):
        raise UserError(f"{len(models)} --model need as many different --name, got {len(set(names))}")
    share = Share.parse(options.worker)
    if options.dry_run:
        folder = config.paths.evaluation
        return dry_run(
            config, [*config.evaluation.input, *models], [folder / f"{name}.json" for name in names]
        )
    from lopd_megatron.evaluation.evaluate import run_evaluation

    return run_evaluation(config, list(zip(names, models, strict=True)), (share.index, share.count))
