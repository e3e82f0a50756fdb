"""torchrun that tells the truth about its workers: `python -m lopd_megatron.launch.torchrun`, same options.

Differences to plain `torchrun`, each needed by a job that stops and comes back:

* The exit code is that of the worker that failed first (128 + n for signal n). torchrun makes every
  failure 1, so "saved, start me again" (`errors.EXIT_REQUEUE`) cannot be told from "broken".
* SIGTERM and SIGUSR1 are passed on to the workers, which save and stop in their own time. torchrun kills its
  workers 30 s after SIGTERM, and dies of SIGUSR1.
* So does the first Ctrl-C (as SIGTERM: the terminal sends the workers a SIGINT too). The second kills them.
* The rank of this node comes from Slurm; the meeting point from `PET_MASTER_ADDR` and `PET_MASTER_PORT`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

import psutil

from lopd_megatron.errors import EXIT_INTERRUPTED, EXIT_REQUEUE

SETTLE_S = 5.0
"""After a worker asked for a requeue: time for the other nodes to say the same. `srun --kill-on-bad-exit`
kills them when the first node leaves, and a killed node would make the job look broken."""


def pass_on(signum: int, frame: FrameType | None = None) -> None:
    """Send a signal to every worker. Slurm may have sent it to them already: handlers are idempotent."""
    for worker in psutil.Process().children():
        worker.send_signal(signum)


def on_interrupt(signum: int, frame: FrameType | None = None) -> None:
    """Ctrl-C: once to save and stop, twice to stop."""
    signal.signal(signal.SIGINT, on_second_interrupt)
    pass_on(signal.SIGTERM)


def on_second_interrupt(signum: int, frame: FrameType | None = None) -> None:
    pass_on(signal.SIGKILL)
    os._exit(EXIT_INTERRUPTED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the workers until all have ended. Returns 0, or the exit code of the first that failed."""
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, pass_on)
    signal.signal(signal.SIGINT, on_interrupt)
    os.environ["LOPD_TORCHRUN"] = "1"  # tells the workers that a signal leaves them time
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with five lines of warning
    if "SLURM_NODEID" in os.environ:
        os.environ.setdefault("PET_NODE_RANK", os.environ["SLURM_NODEID"])

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    options = parse_args(argv)
    options.signals_to_handle = "SIGHUP,SIGQUIT"
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code == EXIT_REQUEUE:
            if not options.standalone:
                time.sleep(SETTLE_S)
        else:
            print(f"rank {rank} on {os.uname().nodename} failed with exit code {code}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
