"""The launcher of test worlds itself."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.world import RankError, run_world


def total(value: torch.Tensor) -> tuple[torch.Tensor, int]:
    result = value + dist.get_rank()
    dist.all_reduce(result)
    return result, os.getpid()


def one_rank_raises(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()


def one_rank_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def never_ends() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    import time

    time.sleep(600)


@pytest.mark.dist
def test_results_come_back_in_rank_order_from_fresh_processes() -> None:
    results = run_world(total, 3, torch.tensor(10))
    assert [int(value) for value, _ in results] == [33, 33, 33]
    assert len({pid for _, pid in results} | {os.getpid()}) == 4


@pytest.mark.dist
def test_a_failing_rank_ends_the_world_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2:(.|\n)*ValueError: planted"):
        run_world(one_rank_raises, 2, 1)
    with pytest.raises(RankError, match="rank 1 of 2 died"):
        run_world(one_rank_dies, 2)
    with pytest.raises(RankError, match="within 2 s"):
        run_world(never_ends, 2, timeout_s=2)


def threads_of_gloo_devices() -> int:
    """After five more groups, used once each."""
    for _ in range(5):
        dist.all_reduce(torch.ones(1), group=dist.new_group())
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("gloo_tcp_loop")


@pytest.mark.dist
def test_groups_share_a_gloo_device() -> None:
    """A thread of each group would wake a hundred times a second for the rest of the process."""
    assert run_world(threads_of_gloo_devices, 2) == [1, 1]
