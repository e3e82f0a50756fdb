"""Train the student of a recipe with Megatron-Core.

    torchrun --nproc-per-node N -m lopd_megatron.train --recipe FILE.py:FUNCTION [section.key=value ...]

Continues by itself from the newest checkpoint below run_dir. Exit codes: 0 done, 85 stopped by a signal or
the time limit after saving (start the same command again), 2 wrong input, 1 any other failure.
"""

from __future__ import annotations

from lopd_megatron import cli
from lopd_megatron.errors import UserError
from lopd_megatron.imports import quick_imports
from lopd_megatron.train.abort import run_rank
from lopd_megatron.train.launched import launch_rank


def main() -> int:
    config, options = cli.parse(cli.parser(__doc__))
    for section, program in (("effopd", "train_effopd"), ("online", "train_online")):
        if getattr(config, section).enabled:
            raise UserError(f"{section}.enabled=true: start -m lopd_megatron.launch.{program} instead")
    if options.dry_run:
        if launch_rank():
            return 0
        paths = config.paths
        reads = [config.model.student, *config.dataset_prefixes, *config.data.valid_prefixes]
        return cli.dry_run(config, reads, [paths.checkpoints, paths.metrics, paths.config])
    from lopd_megatron.parallel import prepare_megatron

    prepare_megatron()
    with quick_imports():
        from lopd_megatron.train.loop import run

    return run(config)


if __name__ == "__main__":
    run_rank(main)
