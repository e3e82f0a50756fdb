"""Weights between a Hugging Face folder and the live model chunks, tensor by tensor, in any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lopd_megatron.errors import UserError
from lopd_megatron.hf_folder import HfFolder
from lopd_megatron.model.export import WholeTensors, check_output, write_hf_folder
from lopd_megatron.model.names import (
    Weight,
    canonical_name,
    global_name,
    hf_shapes,
    merge,
    shard,
    tied_copy,
    unshard,
    weight_table,
)
from lopd_megatron.model.student import StudentModel
from lopd_megatron.model.student_spec import StudentSpec
from lopd_megatron.parallel.topology import Topology
from lopd_megatron.progress import log_line


def load_hf(
    chunks: Sequence[StudentModel], folder: str | Path, spec: StudentSpec, topology: Topology
) -> None:
    """Set every parameter of `chunks` from the safetensors of `folder`; no collectives.

    Each rank reads the tensors its parameters are made of, one at a time. A tensor that the model has no
    place for, a parameter without a tensor and a wrong shape are UserErrors that name them.
    """
    source = HfTensors(folder, spec)
    if topology.rank == 0 and source.files.is_rounded_in(source.dtype):
        log_line(
            f"{folder} stores {', '.join(sorted(source.files.kinds()))}: weights are rounded to bfloat16; "
            "train.precision=fp32 keeps them"
        )
    load_tensors(chunks, source, spec, topology)


def load_tensors(
    chunks: Sequence[StudentModel], source: WholeTensors, spec: StudentSpec, topology: Topology
) -> None:
    """Set every parameter of `chunks` from whole Megatron tensors; no collectives."""
    table = weight_table(spec)
    for name, parameter in named_parameters(chunks, spec, topology):
        weight = table[name]
        if weight.expert:
            rank, size = topology.expert_tp_rank, topology.expert_tp_size
        else:
            rank, size = topology.tp_rank, topology.tp_size
        tensor = shard(weight, source.read(weight), rank, size)
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{name} has shape {tuple(parameter.shape)} here and {tuple(tensor.shape)} in the files "
                f"({' + '.join(weight.hf_names)}); config.json and weights do not belong together"
            )
        with torch.no_grad():
            parameter.copy_(tensor)


def named_parameters(
    chunks: Sequence[StudentModel], spec: StudentSpec, topology: Topology
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(table name, parameter) of everything this rank holds; a name that the table lacks is an error."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    table = weight_table(spec)
    expert_offset = topology.ep_rank * (spec.num_experts // topology.ep_size)
    for chunk in chunks:
        layer_offset = get_transformer_layer_offset(
            spec.transformer_config, vp_stage=chunk.vp_stage, pp_rank=topology.pp_rank
        )
        for local, parameter in chunk.named_parameters():
            name = global_name(canonical_name(local), layer_offset=layer_offset, expert_offset=expert_offset)
            name = tied_copy(spec, name)
            if name not in table:
                raise UserError(f"Megatron parameter {local} ({name}) has no Hugging Face counterpart")
            yield name, parameter


class HfTensors:
    """Whole Megatron tensors, merged from a Hugging Face folder as they are asked for."""

    def __init__(self, folder: str | Path, spec: StudentSpec) -> None:
        """A UserError where names and shapes of the folder are not exactly those of the config."""
        self.dtype: torch.dtype = spec.transformer_config.params_dtype
        self.files = HfFolder(folder)
        if spec.tied_embeddings:
            self.files.refuse_second_head()
        self._spec = spec
        self._check_coverage()
        self._check_shapes()

    def shape(self, weight: Weight) -> tuple[int, ...]:
        parts = [torch.empty(self.files.shape(name), device="meta") for name in weight.hf_names]
        return tuple(self._pad(weight, merge(weight, parts, self._spec)).shape)

    def read(self, weight: Weight) -> torch.Tensor:
        """In the stored dtype, on the CPU."""
        parts = [self.files.read(name) for name in weight.hf_names]
        return self._pad(weight, merge(weight, parts, self._spec))

    def _pad(self, weight: Weight, tensor: torch.Tensor) -> torch.Tensor:
        """Zero rows up to the padded vocabulary."""
        if not weight.vocabulary:
            return tensor
        missing = self._spec.padded_vocab_size - len(tensor)
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor

    def _check_coverage(self) -> None:
        wanted = {name for weight in weight_table(self._spec).values() for name in weight.hf_names}
        present = self.files.names()
        if self._spec.tied_embeddings:
            present.discard("lm_head.weight")  # some folders store the embedding twice
        for names, problem in ((wanted - present, "lacks"), (present - wanted, "has unknown")):
            if names:
                raise UserError(
                    f"{self.files.folder} {problem} {len(names)} tensor(s): {', '.join(sorted(names)[:3])}; "
                    f"is it a whole {self._spec.hf_config['model_type']} model?"
                )

    def _check_shapes(self) -> None:
        for weight in weight_table(self._spec).values():
            for name, shape in zip(weight.hf_names, hf_shapes(weight, self._spec), strict=True):
                found = self.files.shape(name)
                if found != shape:
                    raise UserError(
                        f"{name} in {self.files.folder} has shape {list(found)}, and config.json describes "
                        f"{list(shape)}; they do not belong together"
                    )


def export_hf(
    chunks: Sequence[StudentModel],
    spec: StudentSpec,
    topology: Topology,
    out_folder: str | Path,
    source_hf_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    lineage: dict[str, Any] | None = None,
) -> None:
    """Write the live model as a Hugging Face folder; collective over the world, rank 0 writes.

    Tensors travel one at a time from the ranks that hold them to rank 0: memory there is the largest
    parameter and its shards, traffic the size of the model once. The folder appears whole or not at all.
    Under `overlap_param_gather` the caller first brings the parameters up to date.
    """
    out_folder, source_hf_folder = Path(out_folder), Path(source_hf_folder)
    check_output(out_folder, source_hf_folder, overwrite=overwrite)
    live = LiveTensors(chunks, spec, topology)
    if topology.rank == 0:
        write_hf_folder(
            live, spec, out_folder, source_hf_folder, dtype=dtype, overwrite=overwrite, lineage=lineage
        )
    else:
        for weight in weight_table(spec).values():
            live.read(weight)
    dist.barrier()


class LiveTensors:
    """Whole tensors of the live model, gathered on rank 0 one at a time."""

    def __init__(self, chunks: Sequence[StudentModel], spec: StudentSpec, topology: Topology) -> None:
        """Collective over the world: the ranks tell each other which shards they hold."""
        self.dtype: torch.dtype = spec.transformer_config.params_dtype
        self._topology = topology
        self._mine: dict[str, torch.Tensor] = {}
        table = weight_table(spec)
        for name, parameter in named_parameters(chunks, spec, topology):
            if _is_first_replica(table[name], topology):
                self._mine.setdefault(name, parameter.detach())
        mine = {
            name: (_tensor_parallel_rank(table[name], topology), tuple(tensor.shape))
            for name, tensor in self._mine.items()
        }
        everyone: list[Any] = [None] * topology.world_size
        dist.all_gather_object(everyone, mine)
        # name → tensor-parallel rank → (the first global rank that holds the shard, its shape)
        self._holders: dict[str, dict[int, tuple[int, tuple[int, ...]]]] = defaultdict(dict)
        for rank, held in enumerate(everyone):
            for name, (tp_rank, shape) in held.items():
                self._holders[name].setdefault(tp_rank, (rank, shape))
        missing = table.keys() - self._holders.keys()
        if missing:
            raise UserError(f"no rank holds {len(missing)} parameter(s): {', '.join(sorted(missing)[:3])}")

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Of the whole tensor; local."""
        parts = [torch.empty(shape, device="meta") for _, shape in self._parts(weight)]
        return tuple(unshard(weight, parts).shape)

    def read(self, weight: Weight) -> torch.Tensor:
        """The whole tensor on rank 0, an empty one elsewhere. Point to point between holders and rank 0."""
        parts = []
        for rank, shape in self._parts(weight):
            if rank == self._topology.rank:
                part = self._mine[weight.name]
                if rank != 0:
                    dist.send(part.contiguous(), dst=0)
            elif self._topology.rank == 0:
                part = torch.empty(shape, dtype=self.dtype, device=self._topology.device)
                dist.recv(part, src=rank)
            else:
                continue
            parts.append(part)
        return unshard(weight, parts) if self._topology.rank == 0 else torch.empty(0)

    def _parts(self, weight: Weight) -> list[tuple[int, tuple[int, ...]]]:
        """(global rank, shard shape) in tensor-parallel order; one holder of a tensor that is not split."""
        holders = self._holders[weight.name]
        ordered = [holders[tp_rank] for tp_rank in sorted(holders)]
        return ordered[:1] if weight.layout == "whole" else ordered


def _tensor_parallel_rank(weight: Weight, topology: Topology) -> int:
    return topology.expert_tp_rank if weight.expert else topology.tp_rank


def _is_first_replica(weight: Weight, topology: Topology) -> bool:
    """Whether no lower rank of the data-parallel group holds the same shard."""
    group = topology.expert_dp_group if weight.expert else topology.dp_cp_group
    return group.rank() == 0
