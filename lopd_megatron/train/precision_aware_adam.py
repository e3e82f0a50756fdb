"""AdamW with bfloat16 moments and gradients beside float32 main parameters, for one bounded working set.

Megatron-Core's precision-aware optimizer takes Transformer Engine's FusedAdam for this, which (2.9 to 2.11)
copies both moments of all parameters to float32 in every step: 66 GB for an 8B student on one GPU. With
Megatron's default of storing only the low halves of the main parameters, a `fully_reshardable` checkpoint
holds those halves and cannot be loaded. So neither is used, and the option asks for no other package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CHUNK_ELEMENTS = 1 << 26
"""Parameters updated at a time where the update is not compiled, with a few float32 temporaries of each."""


class PrecisionAwareAdam(torch.optim.AdamW):
    """The part of FusedAdam's interface that Megatron-Core's DistributedOptimizer uses; it takes AdamW only.

    Reads the gradient from `parameter.decoupled_grad` (any dtype) and keeps per parameter `master_param`
    float32 and the two moments in their dtypes; arithmetic is float32. `step` counts per group; the copy in
    each state is where Megatron-Core looks for it without Transformer Engine.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        exp_avg_dtype: torch.dtype = torch.bfloat16,
        exp_avg_sq_dtype: torch.dtype = torch.bfloat16,
        adam_w_mode: bool = True,
        **fixed: Any,
    ) -> None:
        """`fixed`: what Megatron-Core sets besides (main parameters in float32, decoupled gradients)."""
        assert adam_w_mode
        assert fixed.get("master_weight_dtype", torch.float32) == torch.float32
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            scalars = _scalars(group)
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.initialize_state(parameter)
                self.state[parameter]["step"].fill_(group["step"])
                gradient = getattr(parameter, "decoupled_grad", None)
                if gradient is not None and parameter.numel():
                    self._update(parameter, gradient, group, scalars)

    def _update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], scalars: torch.Tensor
    ) -> None:
        state, betas, eps = self.state[parameter], group["betas"], group["eps"]
        whole = [
            tensor.view(-1)
            for tensor in (
                parameter.detach(),
                gradient,
                state["master_param"],
                state["exp_avg"],
                state["exp_avg_sq"],
            )
        ]
        if parameter.is_cuda:
            _compiled_update()(*whole, scalars=scalars, betas=betas, eps=eps)
        else:
            for parts in zip(*(tensor.split(CHUNK_ELEMENTS) for tensor in whole), strict=True):
                adamw_(*parts, scalars=scalars, betas=betas, eps=eps)

    def initialize_state(self, parameter: torch.Tensor) -> None:
        """Zero moments, and the main parameter as the model has it."""
        self.state[parameter] = {
            "step": torch.tensor(0.0),
            "master_param": parameter.detach().float().clone(),
            **{name: torch.zeros_like(parameter, dtype=dtype) for name, dtype in self._dtypes.items()},
        }

    def get_unscaled_state(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        return self.state[parameter][name].float()

    def set_scaled_state(self, parameter: torch.Tensor, name: str, value: torch.Tensor) -> None:
        if not self.state[parameter]:
            self.initialize_state(parameter)
        with torch.no_grad():
            self.state[parameter][name].copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the tensors as they are; torch's own would cast each to the dtype of its parameter."""
        super().load_state_dict({**state_dict, "state": {}})
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, values in state_dict["state"].items():
            # With Transformer Engine installed, Megatron-Core makes states that have no step.
            self.state[order[index]] = {"step": torch.tensor(0.0), **values}


def _scalars(group: dict[str, Any]) -> torch.Tensor:
    """What changes from step to step, as a tensor, so that a compiled update stays the same: see `adamw_`."""
    (beta1, beta2), step, lr = group["betas"], group["step"], group["lr"]
    values = [1 - lr * group["weight_decay"], lr / (1 - beta1**step), (1 - beta2**step) ** -0.5]
    device = group["params"][0].device if group["params"] else None
    return torch.tensor(values, dtype=torch.float32, device=device)


def adamw_(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    scalars: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One AdamW update in place; all [n]. `scalars`: 1 − lr · decay, lr / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ)."""
    (beta1, beta2), (decay, rate, correction) = betas, scalars.unbind()
    g = gradient.float()
    first = exp_avg.float() * beta1 + g * (1 - beta1)
    second = exp_avg_sq.float() * beta2 + g * g * (1 - beta2)
    new = master * decay - rate * first / (second.sqrt() * correction + eps)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    master.copy_(new)
    parameter.copy_(new)


@functools.cache
def _compiled_update() -> Callable[..., None]:
    """`adamw_` as one kernel: each tensor is read and written once."""
    return torch.compile(adamw_, dynamic=True)


@contextmanager
def precision_aware(config: Any) -> Iterator[None]:
    """Inside, Megatron-Core builds its DistributedOptimizer of `config` (OptimizerConfig) around this Adam.

    Its own check of the option asks for Transformer Engine, so the fields are set after it.
    """
    from megatron.core import optimizer as megatron

    config.use_precision_aware_optimizer = True
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    config.store_param_remainders = False
    config.main_grads_dtype = config.exp_avg_dtype = config.exp_avg_sq_dtype = torch.bfloat16
    ours = {
        "Adam": PrecisionAwareAdam,
        "USING_PYTORCH_OPTIMIZER": False,
        # Asked before an argument of Transformer Engine's Adam is passed; without it the stock one raises.
        "is_te_min_version": lambda *args, **kwargs: False,
    }
    stock = {name: getattr(megatron, name) for name in ours}
    vars(megatron).update(ours)
    try:
        yield
    finally:
        vars(megatron).update(stock)
