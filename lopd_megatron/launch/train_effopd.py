"""Training with EffOPD: `lopd_megatron.train` with one hook more.

    torchrun --nproc-per-node N -m lopd_megatron.launch.train_effopd --recipe FILE.py:FUNCTION \\
        effopd.enabled=true data.valid_prefixes='[PREFIX]' [section.key=value ...]

Exit codes are those of `lopd_megatron.train`.
"""

from __future__ import annotations

import sys

from lopd_megatron import cli
from lopd_megatron.errors import UserError
from lopd_megatron.train.abort import run_rank


def main() -> int:
    config, options = cli.parse(cli.parser(__doc__))
    if not config.effopd.enabled:
        raise UserError("effopd.enabled=false; set it to true or start lopd_megatron.train")
    if options.dry_run:
        held_out = config.effopd.accuracy_problems or config.data.valid_prefixes
        reads = [config.model.student, *config.dataset_prefixes, *held_out]
        return cli.dry_run(config, reads, [config.paths.checkpoints, config.paths.metrics])
    from lopd_megatron.parallel import prepare_megatron

    prepare_megatron()
    from lopd_megatron.launch.effopd import effopd_hooks
    from lopd_megatron.train.loop import run

    return run(config, hooks=effopd_hooks(config, sys.argv[1:]))


if __name__ == "__main__":
    run_rank(main)
