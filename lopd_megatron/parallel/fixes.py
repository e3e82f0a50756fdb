"""Corrections of Megatron-Core 0.16.1 where Transformer Engine and apex are absent, on CPU and GPU alike.

Two of these faults change training silently after a resume. Each correction says what is wrong and how to
tell that a newer Megatron-Core has cured it; a test shows each fault without its correction.
"""

from __future__ import annotations

from typing import Any

import torch

from lopd_megatron.parallel.versions import megatron_version


def install() -> None:
    """Patch Megatron-Core once per process; a version that is not known is refused."""
    megatron_version()
    _moe_without_te()
    _recompute_without_te()
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _torch_adam_in_distributed_optimizer(distrib_optimizer.DistributedOptimizer)


def _moe_without_te() -> None:
    """The router reads `te_general_gemm`, which moe_utils binds only where Transformer Engine imports.

    Cured when `moe_utils` defines the name on its own.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _recompute_without_te() -> None:
    """`CheckpointWithoutOutput(fp8=False)` tests `fp8 is not None` and so needs Transformer Engine.

    Cured when selective recomputation of "layernorm" runs without Transformer Engine.
    """
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    stock = CheckpointWithoutOutput.__init__

    def init(self: Any, fp8: Any = False) -> None:
        stock(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = init


def _torch_adam_in_distributed_optimizer(optimizer_class: Any) -> None:
    """torch's Adam keeps a `step` tensor per parameter, which DistributedOptimizer does not expect."""
    _patch_load(optimizer_class)
    _patch_set_states(optimizer_class)
    _patch_sharded_state_dict(optimizer_class)


def _patch_load(optimizer_class: Any) -> None:
    """`load_state_dict` gives all parameters one shared `step` tensor; N parameters then add N per update.

    Adam's bias correction is wrong from the first step after a resume, with no error.
    Cured when the steps of two parameters differ in identity after a load.
    """
    stock = optimizer_class.load_state_dict

    def load_state_dict(self: Any, state_dict: Any) -> None:
        stock(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    optimizer_class.load_state_dict = load_state_dict


def _patch_set_states(optimizer_class: Any) -> None:
    """Loading copies every state of a parameter from the checkpoint, where `step` is not per parameter.

    KeyError 'step', or an in-place write outside no_grad. Cured when a load into torch's Adam succeeds.
    """
    stock = optimizer_class._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        kept = {"step": state["step"]} if "step" in state else {}
        with torch.no_grad():
            stock(self, model_param, {**tensors, **kept})

    optimizer_class._set_main_param_and_optimizer_states = set_states


def _patch_sharded_state_dict(optimizer_class: Any) -> None:
    """Two faults of the state dict that a save writes and a load fills.

    A fresh torch Adam has no state, so a load asserts: give it zeros first.
    `fully_reshardable` computes offsets as if buckets had no padding between them, and so writes shifted
    moments when several buckets are padded: refused here; one bucket (overlap_grad_reduce=False) is safe.
    Cured when a save with padded buckets comes back equal under another layout.
    """
    stock = optimizer_class.sharded_state_dict

    def sharded_state_dict(
        self: Any,
        model_sharded_state_dict: Any = None,
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict | None = None,
    ) -> Any:
        if is_loading:
            _fill_empty_state(self.optimizer)
        kind = sharding_type or (metadata or {}).get("distrib_optim_sharding_type")
        if not is_loading and kind == "fully_reshardable":
            _refuse_padded_buckets(self.buffers)
        return stock(self, model_sharded_state_dict or {}, is_loading, sharding_type, metadata)

    optimizer_class.sharded_state_dict = sharded_state_dict


def _fill_empty_state(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if adam.state[parameter]:
                continue
            if hasattr(adam, "initialize_state"):  # ours; it keeps more than the two moments
                adam.initialize_state(parameter)
            else:
                adam.state[parameter].update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )


def _refuse_padded_buckets(buffers: Any) -> None:
    for buffer in buffers:
        for bucket in buffer.buckets[:-1]:
            if bucket.grad_data.numel() != bucket.numel_unpadded:
                raise RuntimeError(
                    f"gradient bucket {bucket.bucket_id} is padded and a fully_reshardable save would write "
                    "shifted optimizer state; set optimizer.overlap_grad_reduce=false"
                )
