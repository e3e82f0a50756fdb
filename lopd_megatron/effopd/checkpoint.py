"""The accepted weights in a torch_dist checkpoint: they load under any other layout.

A search after a resume has to start from the same accepted weights; with the initial ones instead, the next
Δ is silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from lopd_megatron.effopd.weights import ParameterShard, WeightLine

PREFIX = "effopd.accepted"


def accepted_state_dict(
    line: WeightLine, model_state: ShardedStateDict, *, is_loading: bool
) -> ShardedStateDict:
    """Name of each shard → the whole parameter, float32 in host memory, sharded as the model's is.

    `model_state` is the `sharded_state_dict` of the model chunks. When saving, the parts that the distributed
    optimizer cut a parameter into are put together: one all-reduce of each parameter in its group. When
    loading, the tensors are what the checkpoint fills.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    by_parameter = {id(entry.data): entry for entry in nested_values(sharded)}
    state = {}
    for shard, accepted in zip(line.shards, line.accepted, strict=True):
        if is_loading:
            whole = torch.empty(shard.parameter.shape, dtype=accepted.dtype)
        else:
            whole = _whole(shard, accepted)
        state[shard.name] = make_sharded_optimizer_tensor(by_parameter[id(shard.parameter)], whole, PREFIX)
    return state


def restore_accepted(line: WeightLine, loaded: dict[str, Any]) -> None:
    """Take this rank's shards out of what a checkpoint filled."""
    for shard, accepted in zip(line.shards, line.accepted, strict=True):
        part = loaded[shard.name].flatten()[shard.start : shard.start + accepted.numel()]
        accepted.copy_(part.view_as(accepted))


def _whole(shard: ParameterShard, accepted: torch.Tensor) -> torch.Tensor:
    if shard.group is None:
        return accepted
    # −0 is the number that changes no other when it is added, not even a 0 of either sign.
    whole = torch.full((shard.parameter.numel(),), -0.0, dtype=accepted.dtype, device=shard.main.device)
    whole[shard.start : shard.start + accepted.numel()] = accepted.flatten().to(whole.device)
    dist.all_reduce(whole, group=shard.group)
    return whole.view(shard.parameter.shape).cpu()
