"""The search walks outwards while the score holds, and never ends below the trained weights."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopd_megatron.effopd.search import HeldOutScore, is_trigger, search


def run(values: dict[int, float], acceptance: str = "at_least", max_k: int = 5) -> tuple[int, list[int]]:
    result = search(lambda m: HeldOutScore(values[m], 0.0, 1), max_k=max_k, acceptance=acceptance)
    return result.multiplier, [trial.multiplier for trial in result.trials]


def test_triggers_are_the_powers_of_two_from_the_first_on() -> None:
    assert [i for i in range(70) if is_trigger(i, 1)] == [1, 2, 4, 8, 16, 32, 64]
    assert [i for i in range(70) if is_trigger(i, 5)] == [8, 16, 32, 64]
    assert not is_trigger(0, 1)


def test_multipliers_are_2k_not_2_to_the_k() -> None:
    assert run({0: 0, 2: 1, 4: 2, 6: 3, 8: 4, 10: 5}) == (10, [0, 2, 4, 6, 8, 10])


def test_the_first_failure_ends_the_search_although_a_later_point_is_better() -> None:
    assert run({0: 1.0, 2: 2.0, 4: 1.5, 6: 9.0}) == (2, [0, 2, 4])


def test_no_candidate_passes() -> None:
    assert run({0: 1.0, 2: 0.9}) == (0, [0, 2])


def test_candidates_are_compared_with_the_best_so_far_not_with_the_start() -> None:
    assert run({0: 0.0, 2: 3.0, 4: 1.0}) == (2, [0, 2, 4])


def test_a_tie_passes_at_least_and_fails_strict() -> None:
    ties = dict.fromkeys(range(0, 12, 2), 0.5)
    assert run(ties)[0] == 10
    assert run(ties, "strict") == (0, [0, 2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_candidate_without_a_finite_score_fails(bad: float) -> None:
    assert run({0: 0.0, 2: bad, 4: 1.0}) == (0, [0, 2])


def test_trained_weights_without_a_finite_score_are_an_error() -> None:
    with pytest.raises(ValueError, match="no finite score"):
        run({0: math.nan, 2: 1.0})


@given(
    st.lists(st.one_of(st.floats(-2, 2), st.just(math.nan)), min_size=5, max_size=5),
    st.floats(-2, 2),
    st.sampled_from(["at_least", "strict"]),
)
def test_never_worse_than_plain_training_on_its_own_score(
    candidates: list[float], start: float, acceptance: str
) -> None:
    values = {0: start} | {2 * k: v for k, v in enumerate(candidates, 1)}
    taken, tried = run(values, acceptance)
    assert values[taken] >= start
    assert all(not values[taken] < values[m] for m in tried)
