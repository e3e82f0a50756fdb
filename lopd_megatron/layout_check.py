"""Layouts that a model cannot have are refused by every program, before anything heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lopd_megatron.cli import RECIPES, recipe_module
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError

LARGEST = 256


def check_layout(config: RunConfig) -> None:
    """UserError for a parallel size that does not divide what it splits, with the sizes that do.

    Nothing is checked where the student's `config.json` is not there yet and its name is unknown.
    """
    model = _architecture(config.model.student)
    if model is None:
        return
    parallel = config.parallel
    heads, kv_heads = (
        model["num_attention_heads"],
        model.get("num_key_value_heads") or model["num_attention_heads"],
    )
    ffn, layers = model.get("intermediate_size") or 1, model["num_hidden_layers"]
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    experts = model.get("num_experts") or model.get("num_local_experts") or 0

    def splits_heads(tp: int) -> bool:
        return heads % tp == 0 and ffn % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)

    _refuse(
        "tensor_model_parallel_size",
        parallel.tensor_model_parallel_size,
        splits_heads,
        f"{heads} attention heads, {kv_heads} KV heads and {ffn} MLP columns",
    )
    _refuse(
        "pipeline_model_parallel_size",
        parallel.pipeline_model_parallel_size,
        lambda pp: layers % (pp * chunks) == 0,
        f"{layers} layers" + (f" in {chunks} virtual stages" if chunks > 1 else ""),
    )
    if experts:
        _refuse(
            "expert_model_parallel_size",
            parallel.expert_model_parallel_size,
            lambda ep: experts % ep == 0,
            f"{experts} experts",
        )


def _refuse(name: str, value: int, fits: Callable[[int], bool], what: str) -> None:
    if fits(value):
        return
    working = [str(size) for size in range(1, LARGEST + 1) if fits(size)]
    raise UserError(
        f"parallel.{name}={value} does not split {what} of the student; these do: {', '.join(working)}"
    )


def _architecture(student: str) -> dict[str, Any] | None:
    """`config.json` of the student, or of a model that the recipes name; None where neither is known."""
    path = Path(student) / "config.json"
    if student and path.is_file():
        try:
            found = json.loads(path.read_text())
            return found if isinstance(found, dict) and "num_attention_heads" in found else None
        except (OSError, ValueError):
            return None  # whoever reads the model says what is wrong with it
    known: dict[str, dict[str, Any]] = recipe_module(RECIPES / "models.py").BY_NAME
    return known.get(Path(student).name.removesuffix("-Base"))
