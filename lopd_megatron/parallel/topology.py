"""Where this rank stands in the process grid: the only caller of Megatron's `parallel_state` getters."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from lopd_megatron.config import ParallelConfig
from lopd_megatron.errors import UserError
from lopd_megatron.parallel import prepare_megatron


@dataclass(frozen=True)
class Topology:
    """Groups and coordinates of this rank; the grid order is Megatron's tp-cp-ep-dp-pp."""

    rank: int
    world_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup  # ranks that share a parameter shard and hold other tokens
    ep_group: dist.ProcessGroup
    expert_dp_group: dist.ProcessGroup  # ranks that share an expert's parameter shard
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    expert_tp_rank: int
    expert_tp_size: int
    virtual_size: int  # model chunks per pipeline rank
    last_stage_rank: int  # global rank of the last pipeline stage in this rank's pipeline

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def initialize(parallel: ParallelConfig, *, seed: int) -> Topology:
    """Join the world of this launch and build Megatron's process groups; seeds all random generators.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT as torchrun sets them; without them the world
    is this one process. NCCL on CUDA, gloo on CPU. Collective over the world. A world size that does not fit
    is a UserError on every rank, before any group is built.
    """
    prepare_megatron()
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(parallel, world_size)
    device = _device()
    if not dist.is_initialized():
        _join_world(device)

    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=dist.get_backend() != "fake",
    )
    topology = _read(parallel, device)
    # Stages differ so that layers of different stages do not draw the same dropout; Megatron's tracker
    # separates the tensor-parallel ranks by itself.
    stage_seed = seed + 100 * topology.pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
    return topology


def destroy() -> None:
    """Drop Megatron's process groups and keep the world, so that another layout can be initialized."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a world that the layout does not divide, naming the numbers."""
    parallel.data_parallel_size(world_size)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if (world_size // pp) % (ep * etp):
        raise UserError(
            f"world size {world_size} / PP {pp} = {world_size // pp} is not a multiple of "
            f"EP·expert TP = {ep}·{etp}; change parallel.expert_model_parallel_size or the process count"
        )
    if parallel.virtual_pipeline_model_parallel_size and pp == 1:
        raise UserError(
            "parallel.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size ≥ 2 (value 1); "
            "remove it or raise the latter"
        )
    if parallel.sequence_parallel and tp == 1:
        raise UserError(
            "parallel.sequence_parallel=true needs tensor_model_parallel_size ≥ 2 (value 1); switch it off"
        )


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _join_world(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _read(parallel: ParallelConfig, device: torch.device) -> Topology:
    from megatron.core import parallel_state as state

    groups = {
        "tp_group": state.get_tensor_model_parallel_group(),
        "pp_group": state.get_pipeline_model_parallel_group(),
        "cp_group": state.get_context_parallel_group(),
        "dp_group": state.get_data_parallel_group(),
        "dp_cp_group": state.get_data_parallel_group(with_context_parallel=True),
        "ep_group": state.get_expert_model_parallel_group(),
        "expert_dp_group": state.get_expert_data_parallel_group(),
    }
    coordinates: dict[str, int] = {}
    dimensions = groups | {"expert_tp_group": state.get_expert_tensor_parallel_group()}
    for name in ("tp", "pp", "cp", "dp", "ep", "expert_tp"):
        coordinates[f"{name}_rank"] = dimensions[f"{name}_group"].rank()
        coordinates[f"{name}_size"] = dimensions[f"{name}_group"].size()
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        virtual_size=parallel.virtual_pipeline_model_parallel_size or 1,
        last_stage_rank=state.get_pipeline_model_parallel_last_rank(),
        **groups,
        **coordinates,
    )
