"""Rollout shards → scored shards: the teacher's log-probs of exactly the sampled token ids, with vLLM.

    python tools/score_rollouts.py --recipe recipes/tiny.py:lightning_opd [--worker 0/4] [scores.topk=64]

Reads `<run_dir>/rollouts`, writes `<run_dir>/scores`.
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
        return dry_run(config, [paths.rollouts, config.model.teacher], [paths.scores])
    return programs.run_scoring(config, share)


if __name__ == "__main__":
    run_program(main)
