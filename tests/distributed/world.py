"""A world of gloo ranks for tests: `run_world(function, world_size, *args)`.

The ranks are forked from one server process that has imported torch and Megatron-Core once, so a world
starts in about a second and still shares nothing with pytest or with an earlier world. On CUDA
(`device="cuda"`) they are NCCL ranks, one GPU each, started anew: CUDA does not survive a fork.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


class RankError(RuntimeError):
    """A rank of a test world raised, died or ran out of time; the message holds its traceback."""


def run_world(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 600, device: str = "cpu"
) -> list[Any]:
    """Run `function(*args)` on `world_size` fresh ranks; return what each rank returned, in rank order.

    `function` is a module-level function; arguments and results travel by pickle (tensors included).
    In each rank torch.distributed is initialised, `prepare_megatron()` was called and torch uses one thread.
    The first failing rank ends the others by their process ids and raises here as `RankError`.
    """
    context = _context() if device == "cpu" else multiprocessing.get_context("spawn")
    # Plain pickle: multiprocessing's own would pass tensors as shared memory of a process that may be gone.
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(sender, call, rank, world_size, f"{folder}/store", device)
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            return _collect([receiver for _, receiver in ranks], time.monotonic() + timeout_s, timeout_s)
        finally:
            for process, _ in ranks:
                if process.is_alive():
                    kill_children(process.pid)
                    process.kill()
                process.join()


def _collect(receivers: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [r for i, r in enumerate(receivers) if i not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [i for i in range(len(receivers)) if i not in results]
            raise RankError(f"ranks {missing} gave no result within {timeout_s:.0f} s")
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                failed, value = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankError(f"rank {rank} of {len(receivers)} died without a result") from None
            if failed:
                raise RankError(f"rank {rank} of {len(receivers)}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _rank_main(sender: Connection, call: bytes, rank: int, world_size: int, store: str, device: str) -> None:
    import torch
    import torch.distributed as dist

    from lopd_megatron.parallel import prepare_megatron

    try:
        prepare_megatron()
        torch.set_num_threads(1)
        os.environ["LOCAL_RANK"] = str(rank)
        if device == "cuda":
            torch.cuda.set_device(rank)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
        function, args = pickle.loads(call)
        result = pickle.dumps((False, function(*args)))
        dist.barrier()
    except BaseException:
        result = pickle.dumps((True, traceback.format_exc()))
    sender.send_bytes(result)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    kill_children(os.getpid())
    # Peers of a failed rank may be inside a collective with it, so there is nothing to wait for.
    os._exit(0)


def kill_children(pid: int) -> None:
    """End what a rank has started and not waited for, such as the manager of a checkpoint writer."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            child.kill()


@functools.cache
def _context() -> Any:
    """The fork server, started once per test session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    stock = dict(os.environ)
    # The server imports its preload by name and knows no sys.path of ours; its environment is the ranks'.
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(stock)
    return context
