"""Points on the line between accepted and current weights, bit by bit."""

import pytest
import torch

from lopd_megatron.effopd.weights import ParameterShard, WeightLine


def line(seed: int = 0) -> tuple[WeightLine, torch.Tensor, torch.Tensor]:
    """A line whose Δ is neither representable nor small beside the weights, with zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    accepted = torch.randn(1003, generator=generator)
    current = accepted + 0.1 * torch.randn(1003, generator=generator)
    accepted[:3] = torch.tensor([0.0, -0.0, 1e-42])
    parameter = torch.nn.Parameter(accepted.clone())
    result = WeightLine([ParameterShard("0.w", parameter, parameter)])
    with torch.no_grad():
        parameter.copy_(current)
    result.begin()
    return result, accepted, current


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.int32)


def test_multiplier_minus_one_is_the_previous_checkpoint_bit_by_bit() -> None:
    weights, accepted, current = line()
    weights.move(8)
    weights.move(-1)
    assert torch.equal(bits(weights.shards[0].main), bits(accepted))
    # The planted wrong way: arithmetic does not come back.
    assert not torch.equal(current + (-1) * (current - accepted), accepted)


def test_multiplier_zero_restores_the_trained_weights_bit_by_bit() -> None:
    weights, _, current = line()
    for multiplier in (2, 4, 10):
        weights.move(multiplier)
    weights.move(0)
    assert torch.equal(bits(weights.shards[0].main), bits(current))


@pytest.mark.parametrize("multiplier", [2, 4, 6, 8, 10])
def test_a_candidate_is_current_plus_multiples_of_delta(multiplier: int) -> None:
    weights, accepted, current = line()
    weights.move(multiplier)
    expected = current.double() + multiplier * (current.double() - accepted.double())
    # Three float32 roundings of numbers below 16 in magnitude.
    torch.testing.assert_close(weights.shards[0].main.detach().double(), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("multiplier", [2, 6, 10])
def test_cutting_a_parameter_changes_no_bit(multiplier: int) -> None:
    """What makes TP2·PP2 equal TP1·PP1: an element does not depend on its neighbours or its alignment."""
    whole, accepted, current = line()
    whole.move(multiplier)
    for cut in (1, 7, 500, 997):
        parts = []
        for part_accepted, part_current in zip(
            (accepted[:cut], accepted[cut:]), (current[:cut], current[cut:]), strict=True
        ):
            parameter = torch.nn.Parameter(part_accepted.clone())
            part = WeightLine([ParameterShard("0.w", parameter, parameter)])
            with torch.no_grad():
                parameter.copy_(part_current)
            part.begin()
            part.move(multiplier)
            parts.append(parameter)
        assert torch.equal(bits(torch.cat(parts)), bits(whole.shards[0].main))


def test_delta_is_measured_from_the_accepted_weights() -> None:
    weights, _, _ = line()
    weights.move(4)
    taken = weights.shards[0].main.detach().clone()
    weights.accept()
    with torch.no_grad():
        weights.shards[0].main.add_(0.5)
    weights.begin()
    weights.move(2)
    torch.testing.assert_close(weights.shards[0].main.detach(), taken + 1.5, rtol=0, atol=4e-6)


def test_the_copy_of_the_current_weights_is_dropped_after_a_search() -> None:
    weights, _, _ = line()
    weights.accept()
    with pytest.raises(ValueError, match="argument"):  # zip(strict=True): nothing to move to
        weights.move(2)
