"""Whole tensors out of a `torch_dist` checkpoint, one at a time, in one process and without a GPU.

Memory: the largest tensor, or the experts of one layer.

The keys on disk are Transformer Engine's whatever wrote them (`specs.py` sees to that); layers and experts
are stacked into leading dimensions where all layers are of one kind: `decoder.layers.mlp.linear_fc1.weight`
[layers, ...], `decoder.layers.mlp.experts.experts.linear_fc1.weight` [layers, experts, ...].
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lopd_megatron.errors import UserError
from lopd_megatron.model import checkpoint_files
from lopd_megatron.model.names import Weight, weight_table
from lopd_megatron.model.student_spec import StudentSpec
from lopd_megatron.progress import log_line


class CheckpointTensors:
    """The model part of a checkpoint folder (`iter_0000150/`). torch.distributed must be initialised."""

    def __init__(self, folder: str | Path, spec: StudentSpec) -> None:
        from megatron.core import dist_checkpointing

        self._folder = str(folder)
        self._spec = spec
        if not (Path(folder) / "metadata.json").is_file():
            raise UserError(f"{folder} is not a checkpoint: it has no metadata.json; name an iter_* folder")
        metadata = dist_checkpointing.load_tensors_metadata(self._folder)
        self._shapes = {
            key: tuple(tensor.global_shape)
            for key, tensor in metadata.items()
            if not key.startswith("optimizer.")
        }
        self._check_shapes()
        # The experts of the layer being read, by their layout: both projections alternate.
        self._experts: dict[str, tuple[tuple, torch.Tensor]] = {}
        dtypes = {metadata[key].dtype for key in self._shapes}
        self.dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32

    def shape(self, weight: Weight) -> tuple[int, ...]:
        key, index = self._locate(weight)
        return self._shapes[key][len(index) :]

    def read(self, weight: Weight) -> torch.Tensor:
        """One whole tensor on the CPU; experts are read a layer at a time."""
        key, index = self._locate(weight)
        if not weight.expert:
            tensor = self._load(key, index)
            if weight.vocabulary and tensor[self._spec.vocab_size :].any():
                raise UserError(
                    f"checkpoint {self._folder}: {weight.name} has {len(tensor)} rows; those after "
                    f"vocab_size={self._spec.vocab_size} of the configuration are no padding; give the "
                    "folder of the model that was trained"
                )
            return tensor
        # Finding one slice among the chunks of a stacked key costs as much as finding a layer of them.
        *layer, expert = index
        place = (key, *layer)
        if self._experts.get(weight.layout, (None,))[0] != place:
            self._experts[weight.layout] = (place, self._load(key, tuple(layer)))
        return self._experts[weight.layout][1][expert]

    def _check_shapes(self) -> None:
        """A UserError where the configuration is not that of the checkpoint: parts would be lost."""
        layers: dict[str, int] = {}
        for key, shape in self._shapes.items():
            if key.startswith("decoder.layers.") and not key.endswith("_extra_state"):
                match = re.match(r"decoder\.layers\.(\d+)\.", key)
                count = int(match[1]) + 1 if match else shape[0]
                layers[key] = count
        found = max(layers.values(), default=0)
        if found != self._spec.num_layers:
            raise UserError(
                f"checkpoint {self._folder} has {found} layers, the configuration {self._spec.num_layers}; "
                "give the folder of the model that was trained"
            )
        for weight in weight_table(self._spec).values():
            shape, expected = self.shape(weight), expected_shape(weight, self._spec)
            rows_fit = shape[0] >= expected[0] if weight.vocabulary else shape[0] == expected[0]
            if len(shape) != len(expected) or not rows_fit or shape[1:] != expected[1:]:
                raise UserError(
                    f"checkpoint {self._folder}: {weight.name} has shape {list(shape)}, the configuration "
                    f"needs {list(expected)}; give the folder of the model that was trained"
                )

    def _load(self, key: str, index: tuple[int, ...]) -> torch.Tensor:
        """What a key holds at a position in its leading dimensions."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import ShardedTensor

        shape = self._shapes[key]
        rest = shape[len(index) :]
        data = torch.empty((1,) * len(index) + rest, dtype=self.dtype)
        offsets = [(axis, position, shape[axis]) for axis, position in enumerate(index)]
        wanted = {"tensor": ShardedTensor.from_rank_offsets(key, data, *offsets)}
        loaded = dist_checkpointing.load(wanted, self._folder, validate_access_integrity=False)
        return loaded["tensor"].reshape(rest)

    def _locate(self, weight: Weight) -> tuple[str, tuple[int, ...]]:
        """Key on disk and the position in its leading dimensions (layer, expert) where it is stacked."""
        key, layer, expert = disk_key(weight.name, self._spec.moe_layers)
        index = () if expert is None else (expert,)
        if key in self._shapes:
            return key, index
        stacked = stacked_key(key)
        if layer is not None and stacked in self._shapes:
            return stacked, (layer, *index)
        raise UserError(f"checkpoint {self._folder} has no {key}; it was written for another model")


def expected_shape(weight: Weight, spec: StudentSpec) -> tuple[int, ...]:
    """Of the whole Megatron tensor by the configuration; a vocabulary not yet padded."""
    config = spec.transformer_config
    hidden, head = config.hidden_size, config.kv_channels
    ffn = config.moe_ffn_hidden_size if weight.expert else config.ffn_hidden_size
    heads, groups = config.num_attention_heads, config.num_query_groups
    qkv = (heads + 2 * groups) * head
    shapes = {
        "linear_proj.weight": (hidden, heads * head),
        "linear_qkv.weight": (qkv, hidden),
        "linear_qkv.bias": (qkv,),
        "q_layernorm.weight": (head,),
        "k_layernorm.weight": (head,),
        "router.weight": (spec.num_experts, hidden),
        "linear_fc1.weight": (2 * ffn, hidden),
        "linear_fc2.weight": (hidden, ffn),
        "word_embeddings.weight": (spec.vocab_size, hidden),
        "output_layer.weight": (spec.vocab_size, hidden),
    }
    return next((shape for end, shape in shapes.items() if weight.name.endswith(end)), (hidden,))


def disk_key(name: str, moe_layers: list[bool]) -> tuple[str, int | None, int | None]:
    """Table name → (key with its layer number, layer, expert)."""
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    layer = int(match[1]) if match else None
    key = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    if layer is not None and not moe_layers[layer]:
        key = key.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    match = re.search(r"local_experts\.(\d+)\.", key)
    expert = int(match[1]) if match else None
    return re.sub(r"local_experts\.\d+\.", "experts.", key), layer, expert


def stacked_key(key: str) -> str:
    """The key that all layers of one kind share: without the layer number."""
    return re.sub(r"(?<=decoder\.layers\.)\d+\.", "", key)


def newest_checkpoint(folder: Path) -> Path:
    """`folder` itself where it is a checkpoint, else its newest whole one.

    Every byte is compared with its hash. UserError where the named one is damaged, or where none is whole.
    """
    if not (folder / "metadata.json").is_file():
        return checkpoint_files.newest_undamaged(folder)
    if (folder / checkpoint_files.DESCRIPTION).is_file():
        description, problem = checkpoint_files.inspect(folder)
        problem = problem or checkpoint_files.damage(folder, description)
        if problem:
            raise UserError(f"{folder} is torn ({problem}); take another checkpoint, or copy it again")
        if checkpoint_files.has_hashes(description):
            return folder
    log_line(f"{folder} was written without hashes: its bytes cannot be checked")
    return folder
