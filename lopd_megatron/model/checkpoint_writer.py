"""A Hugging Face folder into a `torch_dist` checkpoint of the model, tensor by tensor, in one process.

The planner announces shapes and offsets from the files' headers; the storage writer of torch asks for each
tensor when its turn comes and drops it, so memory is the largest parameter and its parts.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from lopd_megatron.errors import UserError
from lopd_megatron.files import fsync_path
from lopd_megatron.model import checkpoint_files
from lopd_megatron.model.checkpoint_reader import disk_key, stacked_key
from lopd_megatron.model.export import WholeTensors
from lopd_megatron.model.names import Weight, weight_table
from lopd_megatron.model.student_spec import StudentSpec
from lopd_megatron.progress import progress


def write_checkpoint(source: WholeTensors, spec: StudentSpec, folder: Path) -> None:
    """Write `folder` so that any layout's `model.sharded_state_dict` loads from it; whole or not at all."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    if folder.exists():
        raise UserError(f"output {folder} exists; remove it or choose another")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, thread_count=1)
        dcp.save({}, storage_writer=writer, planner=_StreamingPlanner(source, spec), no_dist=True)
        torch.save({"iteration": 0}, temporary / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(temporary))
        checkpoint_files.seal(temporary, {"iteration": 0})
        os.replace(temporary, folder)
        fsync_path(folder.parent)
    except BaseException as error:
        problem = None if isinstance(error, UserError) else checkpoint_files.disk_problem(temporary, error)
        shutil.rmtree(temporary, ignore_errors=True)
        if problem:
            raise UserError(problem) from error
        raise


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Plans every weight of the table as one chunk of its key on disk, and reads it when it is written."""

    def __init__(self, source: WholeTensors, spec: StudentSpec) -> None:
        super().__init__(flatten_state_dict=False)
        self._source = source
        self._spec = spec
        self._weights: dict[MetadataIndex, Weight] = {}
        self._bar = progress(None, "writing checkpoint", "tensors")

    def create_local_plan(self) -> SavePlan:
        items = [self._item(weight) for weight in weight_table(self._spec).values()]
        self._bar.total = len(items)
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.tensor_data is not None
        tensor = self._source.read(self._weights[write_item.index]).to(self._source.dtype)
        self._bar.update(1)
        return tensor.reshape(write_item.tensor_data.chunk.sizes)

    def _item(self, weight: Weight) -> WriteItem:
        key, leading, index = self._place(weight)
        shape = self._source.shape(weight)
        offsets = torch.Size([*index, *(0 for _ in shape)])
        where = MetadataIndex(key, offsets)
        self._weights[where] = weight
        return WriteItem(
            index=where,
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, torch.Size([*(1 for _ in index), *shape])),
                properties=TensorProperties(dtype=self._source.dtype),
                size=torch.Size([*leading, *shape]),
            ),
        )

    def _place(self, weight: Weight) -> tuple[str, list[int], list[int]]:
        """Key on disk, sizes of its leading dimensions and the position in them."""
        spec = self._spec
        key, layer, expert = disk_key(weight.name, spec.moe_layers)
        leading: list[int] = []
        index: list[int] = []
        stacked = not isinstance(spec.transformer_config.moe_layer_freq, list)
        if layer is not None and stacked:
            key = stacked_key(key)
            leading.append(spec.num_layers)
            index.append(layer)
        if expert is not None:
            leading.append(spec.num_experts)
            index.append(expert)
        return key, leading, index
