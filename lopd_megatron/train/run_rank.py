"""One rank's failure ends the whole job: its peers may wait for it in a collective, for ever."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from lopd_megatron.errors import EXIT_USER_ERROR, UserError
from lopd_megatron.train.launch_env import launch_rank

OTHER_RANKS_WAIT_S = 3.0


def run_rank(main: Callable[[], int]) -> None:
    """Run `main` as the program of one rank; never returns.

    A UserError is one line. Usually every rank finds the same one, so rank 0 prints at once and the others
    wait for the launcher to end them; an error that only one rank has still appears. Everything else keeps
    its traceback. The process leaves without clean-up, which could block on a peer.
    """
    rank = launch_rank()
    # Megatron-Core says on every rank and in many places that optional packages are absent and that it
    # calls deprecated functions of torch; the run's own messages would drown in it.
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    code = 1
    try:
        code = main()
    except UserError as error:
        code = EXIT_USER_ERROR
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends this rank with it
            time.sleep(OTHER_RANKS_WAIT_S)
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr)
    except SystemExit as leave:  # argparse: help, or a usage error it has printed
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException as error:
        if type(error).__name__ == "OutOfMemoryError":
            print(out_of_memory_message(rank, error), file=sys.stderr)
        else:
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def out_of_memory_message(rank: int, error: BaseException) -> str:
    """What to change when the accelerator is full; the first line of torch's message says how full."""
    return (
        f"error on rank {rank}: out of memory: {str(error).splitlines()[0]} Lower data.seq_length or "
        "train.micro_batch_size, set train.recompute_granularity=full, or raise a parallel size "
        "(lopd plan predicts memory)"
    )
