"""What a Hugging Face tensor is, by its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Module:
    """Where a tensor belongs."""

    group: str
    """"attention", "mlp", "embedding", "output" or "norm"."""
    name: str
    """"q_proj", "down_proj", …; all experts of a layer share one."""
    layer: int | None


def module_of(tensor: str) -> Module:
    """`model.layers.3.mlp.experts.7.up_proj.weight` → mlp, up_proj, layer 3."""
    found = _LAYER.search(tensor)
    layer = int(found[1]) if found else None
    name = _EXPERT.sub(".", tensor).removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
    if "norm" in name:
        return Module("norm", name, layer)
    if ".self_attn." in tensor:
        return Module("attention", name, layer)
    if ".mlp." in tensor:
        return Module("mlp", name, layer)
    return Module("embedding" if "embed" in tensor else "output", name, layer)
