"""The processes in which Megatron writes a checkpoint: forked, hashing, and never left behind.

A save forks a process for each file; an asynchronous one forks them from a process of its own. Megatron-Core
0.16.1 waits for them for ever when one of them is killed (as by the kernel when memory is short), and they
outlive a trainer that is killed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any

import psutil
from megatron.core.dist_checkpointing.strategies import filesystem_async

from lopd_megatron.errors import EXIT_FAILURE, UserError
from lopd_megatron.model.checkpoint_files import HashingFile
from lopd_megatron.parallel.versions import writer_function

LOOK_S = 0.5


@functools.cache
def prepare() -> None:
    """Patch Megatron's writer once per process, before the first save.

    Its queue comes from a forked manager process. Megatron would spawn one, which imports the main module
    again: seconds, and a hang where that module is a script without a main guard. The manager ends when this
    process does, even by kill −9.
    """
    from multiprocessing.managers import SyncManager

    if not filesystem_async.HAVE_PSUTIL:
        raise UserError(
            "psutil is not installed, and Megatron-Core's checkpoint writer would hang; install it"
        )
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=_end_with, initargs=(os.getpid(),))
    filesystem_async._results_queue = manager.Queue()
    # Hashing goes on while the files are written, in the processes that write them.
    filesystem_async.open = HashingFile
    writer = filesystem_async.FileSystemWriterAsync
    name = writer_function()
    stock = getattr(writer, name)
    setattr(writer, name, staticmethod(functools.partial(_write, stock, os.getpid())))


def _write(stock: Any, trainer: int, *arguments: Any) -> None:
    """Megatron's own function, in this process or in one that it forked, with a thread that looks around."""
    is_done = threading.Event()
    threading.Thread(target=_look, args=(is_done, trainer), daemon=True).start()
    try:
        stock(*arguments)
    finally:
        is_done.set()


def _look(is_done: threading.Event, trainer: int) -> None:
    me = psutil.Process()
    while not is_done.wait(LOOK_S):
        if os.getpid() != trainer and os.getppid() != trainer:  # killed: nobody will publish the files
            _kill_children(me)
            os._exit(EXIT_FAILURE)
        for child in me.children():
            if (signal_number := _killed_by(child.pid)) and not is_done.is_set():
                print(
                    f"error: a process that writes the checkpoint was killed by signal {signal_number} "
                    "(9: perhaps the kernel, for memory); the checkpoints before it are whole",
                    file=sys.stderr,
                    flush=True,
                )
                _kill_children(me)
                os._exit(EXIT_FAILURE)


def _killed_by(pid: int) -> int:
    """The signal that ended a child of this process which nobody has waited for yet, or 0."""
    try:
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return status.si_status if status and status.si_code in (os.CLD_KILLED, os.CLD_DUMPED) else 0


def _kill_children(process: psutil.Process) -> None:
    for child in process.children():
        try:
            child.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
