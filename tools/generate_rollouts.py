"""Prompt shards → rollout shards, sampled by the student or the teacher (`rollouts.generator`) with vLLM.

    python tools/generate_rollouts.py --recipe recipes/tiny.py:sft [--worker 0/4]

Reads `<run_dir>/prompts`, writes `<run_dir>/rollouts`. Start as many workers as there are GPUs; a worker that
is killed is started again with the same command.
"""

from __future__ import annotations

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.errors import run_program
from lopd_megatron.rollouts import programs


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--worker", default="0/1", metavar="I/N", help="which of N workers this is")
    arguments.add_argument(
        "--max-failed", type=int, default=0, help="documents that may be set aside without exit code 3"
    )
    config, options = parse(arguments)
    paths, share = config.paths, programs.Share.parse(options.worker, options.max_failed)
    if options.dry_run:
        return dry_run(config, [paths.prompts, programs.generator_model(config)], [paths.rollouts])
    return programs.run_rollouts(config, share)


if __name__ == "__main__":
    run_program(main)
