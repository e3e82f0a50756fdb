"""Parquet shards between the offline programs: `shard-00000.parquet`, then `shard-00000.json`.

The JSON is written last and holds the hash of the Parquet file, so a shard without its JSON does not exist.
Nothing in either depends on the time, the machine or the worker: made again, a shard has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lopd_megatron.errors import UserError
from lopd_megatron.files import atomic_path, sha256_file, write_json
from lopd_megatron.lineage import Lineage, parse_lineage
from lopd_megatron.records import SCHEMA_VERSION

Kind = Literal["prompts", "rollouts", "scores"]


def parquet_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.parquet"


def manifest_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.json"


def failures_path(folder: Path, index: int) -> Path:
    """Document id → error, of the documents that a shard lacks."""
    return folder / f"failed-{index:05d}.json"


def read_manifest(folder: Path, index: int) -> dict[str, Any] | None:
    """The JSON of a shard, or None where the shard does not exist (yet)."""
    try:
        return json.loads(manifest_path(folder, index).read_text())
    except FileNotFoundError:
        return None


def manifests(folder: Path, num_shards: int) -> list[dict[str, Any]]:
    """The JSONs of the shards that exist."""
    found = (read_manifest(folder, index) for index in range(num_shards))
    return [manifest for manifest in found if manifest is not None]


def complete_manifests(folder: Path, kind: Kind) -> list[dict[str, Any]]:
    """The JSONs of all shards of a finished stage, in order; refused while one is missing."""
    first = next(iter(sorted(folder.glob("shard-*.json"))), None)
    num_shards = json.loads(first.read_text())["num_shards"] if first else 1
    found = manifests(folder, num_shards)
    if len(found) < num_shards:
        raise UserError(
            f"{folder} has {len(found)} of {num_shards} shards of {kind}; "
            f"run lopd {kind} until it ends with exit code 0"
        )
    for manifest in found:
        if manifest["kind"] != kind or manifest["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{folder} holds {manifest['kind']} of schema version {manifest['schema_version']}, "
                f"not {kind} of version {SCHEMA_VERSION}; give the folder that lopd {kind} wrote"
            )
    return found


def read_table(folder: Path, index: int, schema: pa.Schema) -> pa.Table:
    """One shard in memory; its hash and its columns are checked."""
    path = parquet_path(folder, index)
    manifest = read_manifest(folder, index)
    if manifest is None:
        raise UserError(f"{path} was not finished: it has no {manifest_path(folder, index).name}")
    if not path.is_file() or sha256_file(path) != manifest["sha256"]:
        raise UserError(f"{path} is not the file that its JSON describes; delete both and make them again")
    return pq.read_table(path).cast(schema)


def write_shard(
    folder: Path,
    index: int,
    table: pa.Table,
    *,
    kind: Kind,
    num_shards: int,
    lineage: Lineage,
    failed: int = 0,
) -> dict[str, Any]:
    """Commit one shard: the Parquet file, then its JSON, both atomically. Returns the JSON."""
    path = parquet_path(folder, index)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    lengths = _document_lengths(table)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "index": index,
        "num_shards": num_shards,
        "rows": table.num_rows,
        "tokens": sum(lengths),
        "longest": max(lengths, default=0),
        "failed": failed,
        "sha256": sha256_file(path),
        "lineage": lineage.model_dump(),
    }
    write_json(manifest_path(folder, index), manifest)
    return manifest


def lineage_of(folder: Path, manifests: list[dict[str, Any]]) -> Lineage:
    """The lineage that all shards of a finished stage share."""
    return parse_lineage(manifests[0]["lineage"], manifest_path(folder, 0))


def content_hash(manifests: list[dict[str, Any]]) -> str:
    """One hash for all shards of a stage: what the next stage names as its parent."""
    return hashlib.sha256(" ".join(manifest["sha256"] for manifest in manifests).encode()).hexdigest()


def refuse_other_lineage(
    folder: Path, num_shards: int, lineage: Lineage, *, but: Collection[str] = ()
) -> None:
    """Shards that are there already must come from the same settings, or the folder would mix two runs.

    Fields in `but` may differ.
    """
    for index in range(num_shards):
        manifest = read_manifest(folder, index)
        if manifest is None:
            continue
        if manifest["num_shards"] != num_shards:
            raise UserError(
                f"{folder} was made in {manifest['num_shards']} shards, now {num_shards}; "
                "delete the folder or set another run_dir"
            )
        old = parse_lineage(manifest["lineage"], manifest_path(folder, index))
        for name in Lineage.model_fields.keys() - set(but):
            was, now = getattr(old, name), getattr(lineage, name)
            if not Lineage(**{name: was}).same_content(Lineage(**{name: now})):
                raise UserError(
                    f"{folder} was made with another {name} ({_difference(was, now)}); "
                    "delete the folder or set another run_dir"
                )


def _difference(was: Any, now: Any) -> str:
    """The first key that differs, or both values."""
    if isinstance(was, dict) and isinstance(now, dict):
        key = min(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        return f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
    return f"was {was!r}, now {now!r}"


def _document_lengths(table: pa.Table) -> list[int]:
    """Prompt plus response tokens of each row."""
    columns = [name for name in ("prompt_tokens", "response_tokens") if name in table.column_names]
    counts = [pc.list_value_length(table[name]).to_pylist() for name in columns]
    return [sum(row) for row in zip(*counts, strict=True)]
