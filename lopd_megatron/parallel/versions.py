"""What differs between the supported versions of Megatron-Core: 0.16 on Python 3.11, 0.19 on Python 3.12.

0.17 and later need Python 3.12. All of this file ends when 0.16 does: each function then is its last line.
"""

from __future__ import annotations

import functools
from typing import Any

from lopd_megatron.errors import UserError

SUPPORTED = ("0.16", "0.19")


@functools.cache
def megatron_version() -> str:
    """Major and minor version of the installed Megatron-Core; another than `SUPPORTED` is a UserError.

    The corrections in `fixes` change private parts of Megatron-Core, and were checked for these versions.
    """
    from megatron.core import __version__

    version = ".".join(__version__.split(".")[:2])
    if version not in SUPPORTED:
        raise UserError(
            f"megatron-core {__version__} is installed; this package knows {' and '.join(SUPPORTED)}: "
            "install 0.16.1 on Python 3.11 or 0.19.2 on Python 3.12"
        )
    return version


def is_mixture_of_experts(layer_spec: Any) -> bool:
    """Whether a layer has experts: the class is in a `ModuleSpec` in 0.16, in a partial function in 0.19."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    mlp = layer_spec.submodules.mlp
    return (mlp.module if megatron_version() == "0.16" else mlp.func) is MoELayer


def save_strategy() -> Any:
    """Megatron's writer of torch_dist checkpoints; 0.16 wants the version of the format as well."""
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy

    if megatron_version() == "0.16":
        return get_default_save_sharded_strategy("torch_dist", 1)
    return get_default_save_sharded_strategy("torch_dist")


def save_options() -> dict[str, Any]:
    """Arguments of `dist_checkpointing.save`: 0.19 would leave asynchronous saves to a package of its own."""
    return {} if megatron_version() == "0.16" else {"async_strategy": "mcore"}


def with_own_learning_rates(state: Any, groups: list[dict[str, Any]]) -> Any:
    """A loaded optimizer state whose groups can be found, although the run has another learning rate.

    0.19 finds the group of a state by its `max_lr` and `min_lr`, among others, and fails where they changed.
    All groups of this package share both.
    """
    if isinstance(state, dict):
        if "param_groups" in state:
            own = {name: groups[0][name] for name in ("max_lr", "min_lr")}
            stored = [group | own for group in state["param_groups"]]
            return state | {"param_groups": stored}
        return {name: with_own_learning_rates(value, groups) for name, value in state.items()}
    return state


def write_results_queue() -> Any:
    """The queue through which the processes of a checkpoint writer answer; private in 0.16."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if megatron_version() == "0.16":
        return filesystem_async._get_write_results_queue()
    return filesystem_async.get_write_results_queue()
