"""Seeded documents, shards and model folders for the tests of the data stage."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd_megatron.data.documents import Document
from lopd_megatron.files import sha256_file
from lopd_megatron.lineage import Lineage
from lopd_megatron.records import ROLLOUT_SCHEMA, SCHEMA_VERSION, SCORE_SCHEMA

VOCABULARY = 200_000  # more than 16 bits


def document(rng: np.random.Generator, prompt: int, response: int, topk: int = 0) -> Document:
    size = prompt + response
    mask = np.repeat(np.array([0, 1], np.uint8), [prompt, response])

    def logprobs(*shape: int) -> np.ndarray:
        values = -rng.exponential(1.0, shape).astype(np.float32)
        values[:prompt] = 0.0
        return values

    return Document(
        tokens=rng.integers(0, VOCABULARY, size).astype(np.int32),
        loss_mask=mask,
        teacher_logprobs=logprobs(size),
        rollout_logprobs=logprobs(size),
        teacher_topk_ids=rng.integers(0, VOCABULARY, (size, topk)).astype(np.int32) if topk else None,
        teacher_topk_logprobs=logprobs(size, topk) if topk else None,
    )


def documents(count: int, *, seed: int = 0, longest: int = 60, topk: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, longest + 1, count)
    prompts = [int(rng.integers(1, size)) for size in sizes]
    return [
        document(rng, prompt, int(size) - prompt, topk) for prompt, size in zip(prompts, sizes, strict=True)
    ]


def row(name: str, prompt: Sequence[int], response: Sequence[int], **fields: Any) -> dict[str, Any]:
    """A scored rollout; the log-probs count down from −0.1 unless given."""
    logprobs = [-(i + 1) / 10 for i in range(len(response))]
    return {
        "document_id": f"{name}/0",
        "prompt_id": name,
        "sample_index": 0,
        "prompt_tokens": list(prompt),
        "response_tokens": list(response),
        "rollout_logprobs": logprobs,
        "teacher_logprobs": [2 * value for value in logprobs],
        "finish_reason": "stop",
        "answer": None,
        "teacher_topk_ids": [],
        "teacher_topk_logprobs": [],
    } | fields


def random_rows(rng: np.random.Generator, count: int, prefix: str = "p") -> list[dict[str, Any]]:
    return [
        row(
            f"{prefix}{i}",
            rng.integers(0, 99, int(rng.integers(1, 9))).tolist(),
            rng.integers(0, 99, int(rng.integers(0, 30))).tolist(),
        )
        for i in range(count)
    ]


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[dict[str, Any]]],
    *,
    kind: str = "scores",
    lineage: Lineage | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    schema = SCORE_SCHEMA if kind == "scores" else ROLLOUT_SCHEMA
    names: set[str] = set()
    for index, rows in enumerate(shards):
        path = folder / f"shard-{index:05d}.parquet"
        kept = [{name: value[name] for name in schema.names} for value in rows]
        for number, value in enumerate(kept):  # a row may be given many times, its document id may not
            if value["document_id"] in names:
                value["document_id"] = f"{value['document_id']}-{index}-{number}"
            names.add(value["document_id"])
        pq.write_table(pa.Table.from_pylist(kept, schema), path)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "index": index,
            "num_shards": len(shards),
            "rows": len(rows),
            "tokens": sum(len(r["prompt_tokens"]) + len(r["response_tokens"]) for r in rows),
            "sha256": sha256_file(path),
            "lineage": (lineage or Lineage()).model_dump(),
        }
        path.with_suffix(".json").write_text(json.dumps(manifest))
    return folder


def files_of(prefix: Path) -> dict[str, bytes]:
    """Every file of a dataset by name."""
    paths = sorted(prefix.parent.glob(prefix.name + ".*"))
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def save_model(folder: Path, *, seed: int = 0, vocabulary: Sequence[str] = ("<pad>", "a", "b", "c")) -> Path:
    """A tiny folder in Hugging Face form: config, one safetensors file, a word-level tokenizer.json."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": 4}))
    save_file(
        {name: rng.standard_normal((3, 4)).astype(np.float32) for name in ("a.weight", "b.weight")},
        str(folder / "model.safetensors"),
    )
    save_vocabulary(folder, vocabulary)
    return folder


def save_vocabulary(folder: Path, words: Sequence[str]) -> None:
    tokenizer = {
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def forked(work: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Run `work` in a forked process, perhaps kill −9 it after so many seconds; exit code, or −signal."""
    child = os.fork()
    if not child:
        code = 1
        try:
            faulthandler.disable()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
