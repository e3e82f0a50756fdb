"""Checkpoints are read without running code that a file brings along.

torch 2.13 reads `.metadata` with `pickle.load` (distributed/checkpoint/filesystem.py) and objects such as the
random state with `torch.load(weights_only=False)` (distributed/checkpoint/default_planner.py). Both run
whatever a crafted file names. Here `.metadata` may name torch's own description classes only, and objects go
through torch's restricted unpickler. Not needed any more when torch does either by itself.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import IO, Any

import torch

METADATA_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}
"""Every class that the `.metadata` of a Megatron or torch checkpoint holds, and torch's dtypes with them.
All of them only store what they are given."""

REFUSED = "which no checkpoint needs; it was not run, take the checkpoint from its source again"


class MetadataUnpickler(pickle.Unpickler):
    """Reads a `.metadata`; UnpicklingError where the file names anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        # A dotted name would walk from an allowed class to anything that its module has imported.
        if name in METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, {REFUSED}")


def load_metadata(file: IO[bytes]) -> Any:
    """The description of a checkpoint's tensors, in place of `pickle.load`."""
    return MetadataUnpickler(file).load()


def load_object(file: IO[bytes]) -> Any:
    """Plain values and tensors (random state, common.pt), in place of `torch.load(weights_only=False)`."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise
        raise pickle.UnpicklingError(f"it names {found[1]}, {REFUSED}") from None


def install() -> None:
    """Patch torch once per process."""
    from torch.distributed.checkpoint import default_planner, filesystem

    filesystem.pickle = _Pickle
    default_planner.DefaultLoadPlanner.load_bytes = _load_bytes


class _Pickle:
    """What `filesystem` uses of the module `pickle`."""

    dump = staticmethod(pickle.dump)
    load = staticmethod(load_metadata)


def _load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
    from torch.distributed.checkpoint._traverse import set_element

    name, loaded = read_item.dest_index.fqn, load_object(value)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
