"""Prompt shards → rollout shards, sampled by the student or the teacher (`rollouts.generator`) with vLLM.

    lopd rollouts recipes/tiny.py:sft [--worker 0/4]

Reads `<run_dir>/prompts`, writes `<run_dir>/rollouts`. Start as many workers as there are GPUs; a worker that
is killed is started again with the same command.
"""

from __future__ import annotations

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.rollouts.share import Share, generator_model


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--worker", default="0/1", metavar="I/N", help="which of N workers this is")
    arguments.add_argument(
        "--max-failed", type=int, default=0, help="documents that may be set aside without exit code 3"
    )
    config, options = parse(arguments)
    paths, share = config.paths, Share.parse(options.worker, options.max_failed)
    if options.dry_run:
        return dry_run(config, [paths.prompts, generator_model(config)], [paths.rollouts])
    from lopd_megatron.rollouts.programs import run_rollouts

    return run_rollouts(config, share)
