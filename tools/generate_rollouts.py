"""Prompt shards → rollout shards, sampled by the student or the teacher (`rollout.generator`) with vLLM.

    python tools/generate_rollouts.py --recipe recipes/tiny.py:sft [--worker 0/4]

Reads `<run_dir>/prompts`, writes `<run_dir>/rollouts`. Start as many workers as there are GPUs; a worker that
is killed is started again with the same command.
"""

from __future__ import annotations

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.errors import run_program
from lopd_megatron.inference import shards, stages
from lopd_megatron.inference.engine import VllmEngine
from lopd_megatron.inference.worker import run_worker


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--worker", default="0/1", metavar="I/N", help="which of N workers this is")
    config, options = parse(arguments)
    paths, model = config.paths, stages.generator_model(config)
    if options.dry_run:
        return dry_run(config, [paths.prompts, model], [paths.rollouts])
    prompts = shards.complete_manifests(paths.prompts, "prompts")
    engine = VllmEngine(model, config.rollout.engine, task="generate")
    stage = stages.rollout_stage(config, prompts[0]["lineage"], engine.describe())
    failed = run_worker(stage, engine, paths.prompts, paths.rollouts, len(prompts))
    engine.close()
    return 3 if failed else 0


if __name__ == "__main__":
    run_program(main)
