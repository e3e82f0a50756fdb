"""Is every node of a job fit to train? Run on all of them before training, one process per GPU.

    python -m lopd_megatron.launch.torchrun ... -m lopd_megatron.launch.node_check \\
        --nodes n1,n2 --gpus 8 --folder DIR

Checks, in this order, so that each failure can be pinned on a node: number of GPUs, a folder on the shared
disk that can be written and has room, clocks that agree, and one all-reduce over all ranks (NCCL, or gloo
without GPUs). Every line about a bad node starts with `node NAME:`; exit code 1 if there is one. Costs one
start of Python with torch and three exchanges through a key-value store.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lopd_megatron.progress import log_line

TIMEOUT = timedelta(seconds=180)
CLOCK_TOLERANCE_S = 10.0
"""Files' times, logs and certificates stop making sense beyond this; NTP keeps nodes within milliseconds."""


def local_problems(folder: Path, gpus: int, min_free_gib: float) -> list[str]:
    """What is wrong with this node by itself."""
    found = []
    if torch.cuda.device_count() < gpus:
        found.append(f"{torch.cuda.device_count()} of {gpus} GPUs are visible")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{uuid.uuid4().hex}"
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        return [*found, f"cannot write to {folder}: {error.strerror}"]
    free = shutil.disk_usage(folder).free / 2**30
    if free < min_free_gib:
        found.append(f"{folder} has {free:.0f} GiB free, less than {min_free_gib:.0f}")
    return found


def clock_problems(times: Mapping[str, float]) -> dict[str, str]:
    """Nodes whose clock is off the median of all, from times taken at one moment."""
    middle = sorted(times.values())[len(times) // 2]
    return {
        node: f"its clock is {seconds - middle:+.0f} s off"
        for node, seconds in times.items()
        if abs(seconds - middle) > CLOCK_TOLERANCE_S
    }


class Rendezvous:
    """A key-value store that all ranks reach; rank 0 decides. Keys are `<what>/<rank>`."""

    def __init__(self, nodes: Sequence[str], timeout: timedelta) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        self.nodes = nodes
        self.store = next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
        self.timeout = timeout

    def publish(self, what: str, value: object) -> None:
        self.store.set(f"{what}/{self.rank}", json.dumps(value))

    def gather(self, what: str) -> dict[str, list[Any]]:
        """What the ranks of every node published; a node with a rank silent until the time-out is absent."""
        end = time.monotonic() + self.timeout.total_seconds()
        found: dict[str, list[Any]] = {}
        for index, node in enumerate(self.nodes):
            ranks = range(index * self.per_node, (index + 1) * self.per_node)
            left = timedelta(seconds=max(end - time.monotonic(), 0.01))
            try:
                self.store.wait([f"{what}/{rank}" for rank in ranks], left)
            except dist.DistStoreError:
                continue
            found[node] = [json.loads(self.store.get(f"{what}/{rank}")) for rank in ranks]
        return found

    def decide(self, what: str, problems: Mapping[str, str] | None) -> bool:
        """Rank 0 gives the problems by node, the others pass None; True on all ranks if there are none."""
        if problems is not None:
            for node, problem in problems.items():
                print(f"node {node}: {problem}", flush=True)
            self.store.set(what, json.dumps(not problems))
        self.store.wait([what], 2 * self.timeout)
        return json.loads(self.store.get(what))


def check(nodes: Sequence[str], gpus: int, folder: Path, min_free_gib: float, timeout: timedelta) -> bool:
    """All checks; collective over all ranks. True on every rank when every node is fit."""
    rendezvous = Rendezvous(nodes, timeout)
    is_rank0 = rendezvous.rank == 0
    rendezvous.publish("local", local_problems(folder, gpus, min_free_gib))
    problems: dict[str, str] | None = None
    if is_rank0:
        found = rendezvous.gather("local")
        problems = {node: "did not start" for node in nodes if node not in found}
        problems |= {node: "; ".join(answers[0]) for node, answers in found.items() if any(answers)}
    if not rendezvous.decide("local", problems):
        return False

    rendezvous.publish("time", time.time())  # right after the decision reached everyone
    if is_rank0:
        problems = clock_problems({node: times[0] for node, times in rendezvous.gather("time").items()})
    if not rendezvous.decide("time", problems):
        return False

    rendezvous.publish("sum", _all_reduce(gpus, timeout))
    if is_rank0:
        sums = rendezvous.gather("sum")
        problems = {node: "did not finish an all-reduce over all nodes" for node in nodes if node not in sums}
        problems |= {
            node: f"all-reduce gave {answers}, not {rendezvous.world_size}"
            for node, answers in sums.items()
            if any(answer != rendezvous.world_size for answer in answers)
        }
    return rendezvous.decide("sum", problems)


def _all_reduce(gpus: int, timeout: timedelta) -> int:
    """Sum of a one from every rank, over the network that training will use."""
    device = "cuda" if gpus else "cpu"
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timeout)
    ones = torch.ones(1 << 20, device=device)
    dist.all_reduce(ones)
    total = int(ones[-1].item())
    dist.destroy_process_group()
    return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m lopd_megatron.launch.node_check", description=__doc__)
    parser.add_argument("--nodes", required=True, help="names of the nodes, by node rank, with commas")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that each node must have")
    parser.add_argument("--folder", type=Path, required=True, help="where the run writes")
    parser.add_argument("--min-free-gib", type=float, default=10.0)
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT.total_seconds())
    known = parser.parse_args(argv)
    start = time.monotonic()
    timeout = timedelta(seconds=known.timeout_s)
    fit = check(known.nodes.split(","), known.gpus, known.folder, known.min_free_gib, timeout)
    if fit and os.environ["RANK"] == "0":
        log_line(f"{known.nodes}: fit, checked in {time.monotonic() - start:.1f} s")
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())
