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

_MAKE_AGAIN = "delete its .json and .parquet and run the stage again"
_FIELDS = {
    "schema_version": int,
    "kind": str,
    "index": int,
    "num_shards": int,
    "rows": int,
    "tokens": int,
    "longest": int,
    "failed": int,
    "sha256": str,
    "lineage": dict,
}


def parquet_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.parquet"


def manifest_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.json"


def failures_path(folder: Path, index: int) -> Path:
    """Document id → error, of the documents that a shard lacks."""
    return folder / f"failed-{index:05d}.json"


def read_manifest(folder: Path, index: int) -> dict[str, Any] | None:
    """The JSON of a shard, or None where the shard does not exist (yet); refused where it is another's."""
    path = manifest_path(folder, index)
    try:
        manifest = json.loads(path.read_text())
        wrong = [name for name, kind in _FIELDS.items() if not isinstance(manifest[name], kind)]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not the JSON of a shard ({error}); {_MAKE_AGAIN}") from None
    if wrong or not 0 <= index < manifest["num_shards"]:
        field = wrong[0] if wrong else "num_shards"
        raise UserError(f"{path} is not the JSON of a shard ({field} {manifest[field]!r}); {_MAKE_AGAIN}")
    if manifest["index"] != index:
        raise UserError(
            f"{path} describes shard {manifest['index']}: a shard was copied over another; {_MAKE_AGAIN}"
        )
    return manifest


def manifests(folder: Path, num_shards: int) -> list[dict[str, Any]]:
    """The JSONs of the shards that exist."""
    found = (read_manifest(folder, index) for index in range(num_shards))
    return [manifest for manifest in found if manifest is not None]


def complete_manifests(folder: Path, kind: Kind) -> list[dict[str, Any]]:
    """The JSONs of all shards of a finished stage, in order.

    Refused while one is missing, where they come from several runs, and where two shards hold one document;
    reads the ids of all documents.
    """
    found = [_named_manifest(path) for path in sorted(folder.glob("shard-*.json"))]
    for manifest in found[1:]:
        _refuse_another_run(folder, found[0], manifest)
    num_shards = found[0]["num_shards"] if found else 1
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
    _refuse_repeated_documents(folder, num_shards, "prompt_id" if kind == "prompts" else "document_id")
    return found


def _named_manifest(path: Path) -> dict[str, Any]:
    number = path.stem.removeprefix("shard-")
    manifest = read_manifest(path.parent, int(number)) if number.isdecimal() else None
    if manifest is None:
        raise UserError(f"{path} is not the name of a shard's JSON (shard-00000.json); remove the file")
    return manifest


def _refuse_another_run(folder: Path, first: dict[str, Any], other: dict[str, Any]) -> None:
    names = [manifest_path(folder, manifest["index"]).name for manifest in (first, other)]
    if first["num_shards"] != other["num_shards"]:
        what = f"{first['num_shards']} shards in {names[0]}, {other['num_shards']} in {names[1]}"
    elif first["kind"] != other["kind"]:
        what = f"{first['kind']} in {names[0]}, {other['kind']} in {names[1]}"
    else:
        old, new = (parse_lineage(m["lineage"], manifest_path(folder, m["index"])) for m in (first, other))
        # Workers may run their engines differently: smaller after an out-of-memory, another scoring path.
        if old.same_content(new.model_copy(update={"engine": old.engine})):
            return
        what = f"{names[1]} has another lineage than {names[0]}"
    raise UserError(f"{folder} holds shards of two runs ({what}); delete the folder and make it again")


def _refuse_repeated_documents(folder: Path, num_shards: int, column: str) -> None:
    home: dict[str, Path] = {}
    for index in range(num_shards):
        path = parquet_path(folder, index)
        for name in _read_parquet(path, [column])[column].to_pylist():
            if name in home:
                raise UserError(
                    f"{path} holds the document {name}, as does {home[name].name}: a shard was copied over "
                    f"another; {_MAKE_AGAIN}"
                )
            home[name] = path


def read_table(folder: Path, index: int, schema: pa.Schema) -> pa.Table:
    """One shard in memory; its hash and its columns are checked."""
    path = parquet_path(folder, index)
    manifest = read_manifest(folder, index)
    if manifest is None:
        raise UserError(f"{path} was not finished: it has no {manifest_path(folder, index).name}")
    if not path.is_file() or sha256_file(path) != manifest["sha256"]:
        raise UserError(f"{path} is not the file that its JSON describes; {_MAKE_AGAIN}")
    table = _read_parquet(path)
    try:
        return table.cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(
            f"{path} has other columns than {manifest['kind']} ({error}); {_MAKE_AGAIN}"
        ) from None


def _read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read ({first}); {_MAKE_AGAIN}") from None


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
