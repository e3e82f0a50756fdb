"""Rollout shards → scored shards: the teacher's log-probs of exactly the sampled token ids, with vLLM.

    python tools/score_rollouts.py --recipe recipes/tiny.py:lightning_opd [--worker 0/4] [scoring.topk=64]

Reads `<run_dir>/rollouts`, writes `<run_dir>/scored`.
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
    paths, model = config.paths, config.model.teacher
    if options.dry_run:
        return dry_run(config, [paths.rollouts, model], [paths.scored])
    rollouts = shards.complete_manifests(paths.rollouts, "rollouts")
    engine = VllmEngine(model, config.scoring.engine, task="score", max_topk=config.scoring.topk)
    stage = stages.scoring_stage(config, rollouts[0]["lineage"], engine.describe(), "flat")
    failed = run_worker(stage, engine, paths.rollouts, paths.scored, len(rollouts))
    engine.close()
    return 3 if failed else 0


if __name__ == "__main__":
    run_program(main)
