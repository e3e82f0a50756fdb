"""Hugging Face folders as people have them on disk: each changes one thing of a small random model.

`write(out)` writes them all. It returns, by name, None where the folder must give the logits of transformers,
or what the refusal says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SHARD = "model-00001-of-00001.safetensors"


def random_model(kind: str, **settings: Any) -> Any:
    import transformers

    common = {
        "vocab_size": 211,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # large enough that a wrong weight shows
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**common | settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config).float()


class _Folders:
    """The folders below `out`, and what is expected of each."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.expected: dict[str, str | None] = {}

    def save(
        self,
        name: str,
        model: Any,
        refusal: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        drop: tuple[str, ...] = (),
        tensors: Callable[[Tensors], Tensors] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        folder = self.out / name
        model.to(dtype).save_pretrained(folder)
        model.float()
        stored = load_file(folder / "model.safetensors")
        save_file(tensors(stored) if tensors else stored, folder / "model.safetensors", {"format": "pt"})
        written = json.loads((folder / "config.json").read_text())
        written = {key: value for key, value in written.items() if key not in drop} | (config or {})
        (folder / "config.json").write_text(json.dumps(written))
        self.expected[name] = refusal
        return folder


def write(out: Path) -> dict[str, str | None]:
    """All folders below `out`."""
    folders = _Folders(out)
    qwen3, llama = random_model("Qwen3", head_dim=16), random_model("Llama")
    _of_other_configs(folders, qwen3, llama)
    _of_other_tensors(folders, qwen3, llama)
    _of_other_files(folders, qwen3)
    return folders.expected


def _of_other_configs(folders: _Folders, qwen3: Any, llama: Any) -> None:
    save = folders.save
    tied = random_model("Qwen3", head_dim=16, tie_word_embeddings=True)
    other = torch.randn(211, 64) * 0.1

    save("tied_with_another_head", tied, f"{HEAD} differs", tensors=lambda t: t | {HEAD: other})
    save("tied_with_its_own_head", tied, tensors=lambda t: t | {HEAD: t[EMBEDDING].clone()})
    save("untied_without_a_head", qwen3, HEAD, tensors=lambda t: {k: v for k, v in t.items() if k != HEAD})
    save("yarn_beside_parameters", qwen3, "rope_type 'yarn'", config={"rope_scaling": YARN})
    save(
        "yarn_in_parameters",
        qwen3,
        "rope_type 'yarn'",
        config={"rope_parameters": YARN | {"rope_theta": 1e4}},
    )
    linear = {"type": "linear", "factor": 2.0}
    save(
        "linear_rope", llama, "rope_type 'linear'", config={"rope_scaling": linear}, drop=("rope_parameters",)
    )
    old = {"rope_theta": 5e5, "rope_scaling": None}
    save("old_form_of_rope", llama, config=old, drop=("rope_parameters",))
    save("rope_theta_null", llama, "rope_theta=None", config={"rope_theta": None}, drop=("rope_parameters",))
    save("no_rope_at_all", llama, drop=("rope_parameters",))
    save("half_of_a_head_rotated", llama, "partial_rotary_factor", config={"partial_rotary_factor": 0.5})
    save("no_norm_epsilon", llama, drop=("rms_norm_eps",))
    save("no_positions", llama, drop=("max_position_embeddings",))
    save("no_key_value_heads", random_model("Llama", num_key_value_heads=4), drop=("num_key_value_heads",))
    wide = random_model("Qwen3", head_dim=128, num_attention_heads=2, num_key_value_heads=1)
    save("head_dim_is_the_default", wide, drop=("head_dim",))
    save("float16_files", llama, dtype=torch.float16)
    save("bfloat16_files_called_float32", llama, config={"dtype": "float32"}, dtype=torch.bfloat16)
    save("dtype_with_a_dot", llama, config={"torch_dtype": "torch.float32"}, drop=("dtype",))
    save("no_dtype", llama, drop=("dtype",))
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    qwen2 = random_model("Qwen2")
    save("sliding_window_over_no_layer", qwen2, config=window, drop=("layer_types",))
    some = window | {"max_window_layers": 1}
    save("sliding_window_over_a_layer", qwen2, "use_sliding_window", config=some, drop=("layer_types",))
    moe = {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True}
    save("mixture_of_one", random_model("Qwen3Moe", num_experts_per_tok=1, **moe), "num_experts_per_tok=1")
    save("mixture", random_model("Qwen3Moe", num_experts_per_tok=2, **moe))


def _of_other_tensors(folders: _Folders, qwen3: Any, llama: Any) -> None:
    save = folders.save
    out, other = folders.out, torch.randn(211, 64) * 0.1
    save("one_layer_too_many", qwen3, "model.layers.1", config={"num_hidden_layers": 1, "layer_types": None})
    save("one_layer_too_few", qwen3, "model.layers.2", config={"num_hidden_layers": 3, "layer_types": None})
    save("another_width", qwen3, "do not belong together", config={"intermediate_size": 64})
    save("another_vocabulary", qwen3, "describes [200, 64]", config={"vocab_size": 200})
    save("a_tensor_of_another_model", qwen3, "model.extra", tensors=lambda t: t | {"model.extra": other})
    save("old_inverse_frequencies", llama, tensors=lambda t: t | {f"{ROTARY}.inv_freq": torch.ones(8)})
    save("integers", qwen3, "I32", tensors=lambda t: t | {EMBEDDING: t[EMBEDDING].to(torch.int32)})
    save("an_unknown_family", qwen3, "model_type 'mystery'", config={"model_type": "mystery"})

    save("quantized", qwen3, "quantization_config", config={"quantization_config": {"quant_method": "fp8"}})
    save("an_adapter", qwen3, "adapter_config.json")
    (out / "an_adapter/adapter_config.json").write_text("{}")
    save("pickled_weights", qwen3, "pickled").joinpath("model.safetensors").rename(
        out / "pickled_weights/pytorch_model.bin"
    )
    linked = save("links_as_in_the_cache_of_the_hub", qwen3)
    for file in list(linked.iterdir()):
        blob = out / "blobs" / file.name
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(Path("..") / "blobs" / file.name)
    mixed = save("mixed_dtypes", qwen3)
    stored = load_file(mixed / "model.safetensors")
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    rounded = {name: stored[name].to(kinds[i % 3]) for i, name in enumerate(sorted(stored))}
    save_file(rounded, mixed / "model.safetensors", {"format": "pt"})


def _of_other_files(folders: _Folders, qwen3: Any) -> None:
    save = folders.save
    out = folders.out
    sharded(save("one_shard", qwen3))
    stale = save("stale_index", qwen3, "transformers would read")
    shutil.copytree(stale, out / "_", dirs_exist_ok=True)
    sharded(out / "_")
    for name in (SHARD, INDEX):
        shutil.copy(out / "_" / name, stale)
    shutil.rmtree(out / "_")
    for name, path in (
        ("index_leaves_the_folder", "../one_shard/" + SHARD),
        ("index_is_absolute", f"/{SHARD}"),
    ):
        folder = sharded(save(name, qwen3, "no safetensors file inside the folder"))
        rename_in_index(folder, path)
    rename_in_index(sharded(save("index_of_a_missing_file", qwen3, "does not exist")), "model-2.safetensors")
    folder = sharded(save("index_of_a_missing_tensor", qwen3, "model.nothing"))
    change_index(folder, lambda names: names | {"model.nothing": SHARD})
    folder = sharded(save("a_tensor_the_index_forgot", qwen3, "nothing of it"))
    change_index(folder, lambda names: {k: v for k, v in names.items() if k != HEAD})
    (sharded(save("index_is_no_json", qwen3, "is not readable JSON")) / INDEX).write_text("{")
    (sharded(save("index_without_a_map", qwen3, "has no weight_map")) / INDEX).write_text("{}")
    extra = save("an_adapter_beside_it", qwen3, "adapter_model.safetensors")
    save_file({"a": torch.ones(2)}, extra / "adapter_model.safetensors")
    consolidated = sharded(save("consolidated_beside_an_index", qwen3))
    save_file({"a": torch.ones(2)}, consolidated / "consolidated.safetensors")
    pointer = save("lfs_pointer", qwen3, "Git LFS pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    for name, change in DAMAGES.items():
        file = save(name, qwen3, "is no whole safetensors file") / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))


ROTARY = "model.layers.0.self_attn.rotary_emb"
INDEX = "model.safetensors.index.json"


def sharded(folder: Path) -> Path:
    """The same weights with an index."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / SHARD)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, SHARD)}))
    return folder


def change_index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": change(names)}))


def rename_in_index(folder: Path, file: str) -> None:
    change_index(folder, lambda names: dict.fromkeys(names, file))


def edit_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data[8 + length :]


def _offsets(change: Callable[[list[int]], list[int]]) -> Callable[[bytes], bytes]:
    def edit(header: dict[str, Any]) -> None:
        entry = header[EMBEDDING]
        entry["data_offsets"] = change(entry["data_offsets"])

    return lambda data: edit_header(data, edit)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-40],
    "trailing_bytes": lambda data: data + b"more",
    "empty_file": lambda data: b"",
    "seven_bytes": lambda data: data[:7],
    "header_longer_than_the_file": lambda data: (1 << 40).to_bytes(8, "little") + data[8:],
    "header_is_no_json": lambda data: data[:8] + b"x" + data[9:],
    "reversed_offsets": _offsets(lambda pair: pair[::-1]),
    "overlapping_offsets": _offsets(lambda pair: [pair[0], pair[1] + 8]),
    "negative_offset": _offsets(lambda pair: [-8, pair[1]]),
}
