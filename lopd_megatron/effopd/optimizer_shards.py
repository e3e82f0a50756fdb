"""Megatron's optimizers seen as shards: which tensors a rank owns, and how the model gets them back.

The only file of the package that knows where the optimizers of the pinned Megatron-Core keep main parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer

from lopd_megatron.effopd.weights import ParameterShard

Selection = Literal["all", "attention_mlp"]
Names = dict[torch.nn.Parameter, str]


def is_selected(name: str, selection: Selection) -> bool:
    """Whether a Megatron parameter moves.

    "attention_mlp": everything inside attention and MLP modules, q/k norms and router too; not the
    embedding, the output layer and the layer norms of a block, which Transformer Engine keeps inside the
    linear layer that follows. (The released code also moves post_attention_layernorm: the name matches.)
    """
    if selection == "all":
        return True
    inside = ".self_attention." in name or ".mlp." in name
    return inside and not name.endswith((".layer_norm_weight", ".layer_norm_bias"))


def collect_shards(
    model_chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, selection: Selection
) -> list[ParameterShard]:
    """This rank's part of every selected parameter, in the order of the model.

    The distributed optimizer cuts parameters over data-parallel ranks: a rank that owns nothing of one has
    an empty shard of it, so that all ranks of the group go through the same list.
    """
    names = {}
    for index, chunk in enumerate(model_chunks):
        for name, parameter in chunk.named_parameters():
            names[parameter] = f"{index}.{_unwrapped(name)}"
    shards: dict[torch.nn.Parameter, ParameterShard] = {}
    for part in _parts(optimizer):
        # Transformer Engine's fused Adam then keeps the main parameters itself.
        assert not part.config.use_precision_aware_optimizer, "RunConfig.check refuses this"
        find = _distributed_shards if isinstance(part, DistributedOptimizer) else _whole_shards
        shards |= {shard.parameter: shard for shard in find(part, names)}
    return [shards[p] for p, name in names.items() if p in shards and is_selected(name, selection)]


def publish(model_chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
    """Bring main parameters that were written in place into the model.

    Under the distributed optimizer: one all-gather of the parameters in the data-parallel group.
    """
    distributed = False
    for part in _parts(optimizer):
        if isinstance(part, MixedPrecisionOptimizer):
            part._copy_main_params_to_model_params()
        distributed |= isinstance(part, DistributedOptimizer)
    if distributed:
        for chunk in model_chunks:
            chunk.start_param_sync(force_sync=True)


@torch.no_grad()
def reset_moments(optimizer: MegatronOptimizer) -> None:
    """Let Adam start anew: both moments and its step count are 0 again for every parameter."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            for value in state.values():
                value.zero_()
        for group in part.optimizer.param_groups:
            if "step" in group:  # fused Adam counts per group, torch's per parameter
                group["step"] = 0


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain (dense and expert parameters) that own something on this rank."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chain if not part.is_stub_optimizer]


def _distributed_shards(part: Any, names: Names) -> Iterator[ParameterShard]:
    for parameter in (p for buffer in part.buffers for p in buffer.params):
        main, start = parameter.new_empty(0, dtype=torch.float32, requires_grad=False), 0
        if parameter in part.model_param_group_index_map:
            group, position = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][position]
            start = part._get_model_param_range_map(parameter)["param"].start
        yield ParameterShard(names[parameter], main, parameter, start, part.data_parallel_group)


def _whole_shards(part: MegatronOptimizer, names: Names) -> Iterator[ParameterShard]:
    mains = {id(main) for group in part.optimizer.param_groups for main in group["params"]}
    for parameter, name in names.items():
        main = getattr(parameter, "main_param", parameter)
        if id(main) in mains:
            yield ParameterShard(name, main, parameter)


def _unwrapped(name: str) -> str:
    """A parameter name without the "module." of the data-parallel and precision wrappers."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
