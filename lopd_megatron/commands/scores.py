"""Rollout shards → scored shards: the teacher's log-probs of exactly the sampled token ids, with vLLM.

    lopd scores recipes/tiny.py:lightning_opd [--worker 0/4] [scores.topk=64]

Reads `<run_dir>/rollouts`, writes `<run_dir>/scores`.
"""

from __future__ import annotations

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.rollouts.share import Share


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--worker", default="0/1", metavar="I/N", help="which of N workers this is")
    arguments.add_argument(
        "--max-failed", type=int, default=0, help="documents that may be set aside without exit code 3"
    )
    config, options = parse(arguments)
    paths, share = config.paths, Share.parse(options.worker, options.max_failed)
    if options.dry_run:
        return dry_run(config, [paths.rollouts, config.model.teacher], [paths.scores])
    from lopd_megatron.rollouts.programs import run_scoring

    return run_scoring(config, share)
