"""The precision-aware Adam against torch's AdamW: its arithmetic, its dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lopd_megatron.train import precision_aware_adam
from lopd_megatron.train.precision_aware_adam import PrecisionAwareAdam

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


def trained(steps: int, dtype: torch.dtype, moments: torch.dtype) -> tuple[torch.Tensor, Any]:
    """(main parameter, its state) after some steps on fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(1000, generator=generator).bfloat16().to(dtype).requires_grad_()
    adam = PrecisionAwareAdam([parameter], **SETTINGS, exp_avg_dtype=moments, exp_avg_sq_dtype=moments)
    for _ in range(steps):
        parameter.decoupled_grad = torch.randn(1000, generator=generator).bfloat16()  # type: ignore[attr-defined]
        adam.step()
    return parameter, adam.state[parameter]


def reference(steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(1000, generator=generator).bfloat16().float().requires_grad_()
    adam = torch.optim.AdamW([parameter], **SETTINGS)
    for _ in range(steps):
        parameter.grad = torch.randn(1000, generator=generator).bfloat16().float()
        adam.step()
    return parameter.detach()


@pytest.mark.parametrize("chunk", [1 << 26, 300])
def test_float32_moments_are_torchs_adamw(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of float32: the factors are multiplied in another order."""
    monkeypatch.setattr(precision_aware_adam, "CHUNK_ELEMENTS", chunk)
    parameter, state = trained(20, torch.bfloat16, torch.float32)
    torch.testing.assert_close(state["master_param"], reference(20), rtol=1e-5, atol=1e-6)
    assert torch.equal(parameter, state["master_param"].bfloat16())


def test_bfloat16_moments_keep_their_dtype_and_stay_close() -> None:
    """Twenty steps of 1e-2; a moment rounded to 8 bits moves each step by less than 1 % of it."""
    _, state = trained(20, torch.bfloat16, torch.bfloat16)
    assert {name: value.dtype for name, value in state.items()} == {
        "step": torch.float32,
        "master_param": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }
    assert (state["master_param"] - reference(20)).abs().max() < 20 * 1e-2 * 0.01


def test_a_parameter_without_gradient_keeps_its_value_and_counts_the_step() -> None:
    parameter = torch.ones(3, dtype=torch.bfloat16)
    adam = PrecisionAwareAdam([parameter], **SETTINGS)
    adam.step()
    assert torch.equal(parameter, torch.ones(3, dtype=torch.bfloat16))
    assert adam.state[parameter]["step"] == 1


def test_a_loaded_state_keeps_its_dtypes_and_goes_on() -> None:
    parameter, _ = trained(3, torch.bfloat16, torch.bfloat16)
    first = PrecisionAwareAdam([parameter], **SETTINGS)
    parameter.decoupled_grad = torch.ones(1000).bfloat16()  # type: ignore[attr-defined]
    first.step()
    twin = parameter.detach().clone()
    second = PrecisionAwareAdam([twin], **SETTINGS)
    stored = first.state_dict()
    stored["state"] = {
        index: {name: value.clone() for name, value in values.items() if name != "step"}
        for index, values in stored["state"].items()
    }
    second.load_state_dict(stored)
    twin.decoupled_grad = parameter.decoupled_grad  # type: ignore[attr-defined]
    first.step()
    second.step()
    assert torch.equal(twin, parameter)
    for name, value in first.state[parameter].items():
        assert torch.equal(second.state[twin][name], value)
        assert second.state[twin][name].dtype == value.dtype
