"""The trainer on a slow device: while RUN_DIR/brake exists, a pause of two seconds after every step."""

from __future__ import annotations

import time
from pathlib import Path

from lopd_megatron import cli
from lopd_megatron.train.run_rank import run_rank


def main() -> int:
    config, _ = cli.parse(cli.parser(__doc__))
    from lopd_megatron.parallel import prepare_megatron

    prepare_megatron()
    from lopd_megatron.train.loop import run
    from lopd_megatron.train.state import Hook, StepResult, Trainer

    class Brake(Hook):
        def after_step(self, trainer: Trainer, result: StepResult) -> None:
            time.sleep(2 * (Path(config.run_dir) / "brake").exists())

    return run(config, hooks=[Brake()])


if __name__ == "__main__":
    run_rank(main)
