"""Train the student of a recipe with Megatron-Core: the one training program.

    torchrun --nproc-per-node N -m lopd_megatron.train --recipe FILE.py:FUNCTION [section.key=value ...]

`online.enabled` replaces the dataset by rollouts of live servers, `effopd.enabled` adds its search.
Continues by itself from the newest checkpoint below run_dir. Exit codes: 0 done, 85 stopped by a signal or
the time limit after saving (start the same command again), 2 wrong input, 1 any other failure.
"""

from __future__ import annotations

import sys

from lopd_megatron import cli
from lopd_megatron.config import RunConfig
from lopd_megatron.imports import quick_imports
from lopd_megatron.train.launch_env import launch_rank
from lopd_megatron.train.run_rank import run_rank


def main() -> int:
    config, options = cli.parse(cli.parser(__doc__))
    if options.dry_run:
        return 0 if launch_rank() else dry_run(config)
    from lopd_megatron.parallel import prepare_megatron

    prepare_megatron()
    with quick_imports():
        from lopd_megatron.effopd.trainer_scores import effopd_hooks
        from lopd_megatron.train.hooks import own_hooks
        from lopd_megatron.train.loop import run
    hooks = [*own_hooks(config), *effopd_hooks(config, sys.argv[1:])]
    if not config.online.enabled:
        return run(config, hooks=hooks)
    from lopd_megatron.online.inputs import check_online_inputs, online_rollouts

    rollouts = online_rollouts(config, is_first_rank=launch_rank() == 0)
    # Last: the weights that EffOPD accepts are those that go to the student server.
    return run(config, hooks=[*hooks, rollouts], batches=rollouts, check=check_online_inputs)


def dry_run(config: RunConfig) -> int:
    paths, model = config.paths, config.model
    held_out = [*config.data.valid_prefixes, *config.effopd.accuracy_problems]
    if config.online.enabled:
        reads = [model.student, model.teacher, paths.prompts, *held_out]
    else:
        reads = [model.student, *config.dataset_prefixes, *held_out]
    log = [paths.online_log] if config.online.enabled else []
    return cli.dry_run(config, reads, [paths.checkpoints, paths.metrics, paths.config, *log])


if __name__ == "__main__":
    run_rank(main)
