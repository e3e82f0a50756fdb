"""Nothing lost, nothing split, no row too long, and the ranks carry the same FLOPs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd_megatron.data.packing import best_fit_decreasing, partition_by_cost, plan_step, utilisation

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60).map(np.array)


def lengths_of(name: str, count: int, seed: int = 0) -> np.ndarray:
    """The three length sets of the benchmarks: log-normal responses, cut, and a prompt before them."""
    median, sigma, cut = {
        "ref4k": (7000, 0.9, 4096),
        "short4k": (900, 0.8, 4096),
        "long32k": (8000, 0.8, 32000),
    }[name]
    rng = np.random.default_rng(seed)
    responses = np.minimum(rng.lognormal(np.log(median), sigma, count), cut).astype(np.int64)
    return responses + rng.integers(80, 300, count)


CAPACITY = {"ref4k": 17_408, "short4k": 16_384, "long32k": 32_768}


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, room=st.integers(0, 200))
def test_rows_hold_everything_once(lengths: np.ndarray, room: int) -> None:
    capacity = int(lengths.max()) + room
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert max(int(lengths[row].sum()) for row in rows) <= capacity
    # Best-fit decreasing needs at most 11/9 of the optimum and 1 (Johnson 1973).
    assert len(rows) <= 11 / 9 * -(-int(lengths.sum()) // capacity) * 2 + 1


def test_a_document_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="11 tokens does not fit a row of 10"):
        best_fit_decreasing(np.array([3, 11]), 10)


@settings(max_examples=100, deadline=None)
@given(
    lengths=LENGTHS,
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    multiple_of=st.sampled_from([1, 2, 4]),
    round_to=st.sampled_from([1, 8]),
)
def test_a_plan_holds_everything_once(
    lengths: np.ndarray, ranks: int, multiple_of: int, round_to: int
) -> None:
    plan = plan_step(
        lengths, data_parallel_size=ranks, capacity=128, multiple_of=multiple_of, round_to=round_to
    )
    assert len(plan.microbatches) == ranks
    counts = {len(rank) for rank in plan.microbatches}
    assert len(counts) == 1
    assert counts.pop() % multiple_of == 0
    rows = [row for rank in plan.microbatches for row in rank]
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    longest = max(int(lengths[row].sum()) for row in rows)
    assert longest <= plan.seq_length < longest + round_to
    assert plan.seq_length <= 128
    assert plan.seq_length % round_to == 0


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=40).map(np.array), parts=st.integers(1, 9))
def test_balance_is_no_worse_than_longest_first(costs: np.ndarray, parts: int) -> None:
    groups = partition_by_cost(costs, parts)
    assert sorted(item for group in groups for item in group) == list(range(len(costs)))
    greedy = np.zeros(parts)
    for cost in sorted(costs, reverse=True):
        greedy[greedy.argmin()] += cost
    assert max(costs[group].sum() for group in groups) <= greedy.max() * (1 + 1e-9)


@pytest.mark.parametrize("name", CAPACITY)
@pytest.mark.parametrize("ranks", [8, 16, 32])
def test_ranks_are_balanced_by_flops(name: str, ranks: int) -> None:
    """The figures of the goals: mean ≥ 99.9 %, worst ≥ 99.5 %, micro-batches ≤ lower bound + 1."""
    lengths = lengths_of(name, 20 * 256)
    efficiency, strided = [], []
    for step in range(20):
        here = lengths[step * 256 : (step + 1) * 256]
        plan = plan_step(here, data_parallel_size=ranks, capacity=CAPACITY[name])
        cost = here + here**2 / 51_000  # Qwen3-8B; at 32k tokens attention is 40 % of it
        totals = np.array([sum(cost[row].sum() for row in rank) for rank in plan.microbatches])
        efficiency.append(totals.mean() / totals.max())
        strided.append(cost.sum() / ranks / max(cost[rank::ranks].sum() for rank in range(ranks)))
        bound = -(-int(here.sum()) // (ranks * CAPACITY[name]))
        assert len(plan.microbatches[0]) <= bound + 1
    assert np.mean(efficiency) >= 0.999
    assert min(efficiency) >= 0.995
    assert np.mean(strided) < 0.96  # what a strided split gives: the test would see it


@pytest.mark.parametrize(("name", "least"), [("ref4k", 0.985), ("short4k", 0.998), ("long32k", 0.995)])
def test_rows_are_full(name: str, least: float) -> None:
    assert utilisation(lengths_of(name, 20_000), CAPACITY[name]) >= least
