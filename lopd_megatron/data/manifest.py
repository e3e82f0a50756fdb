"""`<prefix>.manifest.json`: what a dataset holds, byte for byte, and what made it. Written last: no manifest,
no dataset. Its own hash is in it, so an edited manifest is not a manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lopd_megatron.errors import UserError
from lopd_megatron.lineage import Lineage
from lopd_megatron.records import COLUMNS, SCHEMA_VERSION


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """Counts are of documents unless a name says tokens."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["dataset"] = "dataset"
    schema_version: int = SCHEMA_VERSION
    columns: list[str]
    topk: int
    documents: int
    tokens: int
    trained_tokens: int
    lengths: dict[str, list[int]]
    """Histogram of tokens per document: `edges` [m + 1], half open, and `counts` [m]."""
    filters: dict[str, Any]
    """`filters.Filters`; empty where a program wrote the documents."""
    dropped: dict[str, int]
    """Why documents were left out."""
    kept: dict[str, int]
    """Kept although something is to be said of them."""
    alignment: dict[str, Any] | None
    """The alignment proof of the build: see `alignment.AlignmentReport`; None: not made."""
    stops: dict[str, Any] | None = None
    """How the responses end: see `stops.StopCounts.summary`; None: not counted."""
    files: dict[str, FileEntry]
    """`<column>.bin` and `<column>.idx`, without the prefix."""
    lineage: Lineage
    fingerprint: str = ""
    """SHA-256 over all other fields; the content hash of the dataset."""

    def sealed(self) -> Manifest:
        """A copy with its fingerprint."""
        return self.model_copy(update={"fingerprint": self._hash()})

    def is_intact(self) -> bool:
        return self.fingerprint == self._hash()

    def _hash(self) -> str:
        unknown_to_older = {"stops"} if self.stops is None else set()
        value = self.model_dump(mode="json", exclude={"fingerprint"} | unknown_to_older)
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def building_folder(prefix: str | Path) -> Path:
    """Where a build keeps everything until the dataset is whole."""
    return Path(f"{prefix}.building")


def read_manifest(prefix: str | Path) -> Manifest:
    """The manifest of a finished dataset; a UserError names the file and what is wrong with it."""
    path = manifest_path(prefix)
    try:
        text = path.read_text()
    except FileNotFoundError:
        if building_folder(prefix).is_dir():
            raise UserError(
                f"{path} does not exist: the build of {prefix} is running or was stopped; "
                "start the same command again to finish it"
            ) from None
        raise UserError(f"{path} does not exist: there is no dataset {prefix}; run lopd dataset") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not text; build the dataset again") from None
    try:
        value = json.loads(text)
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
                "build the dataset again"
            )
        manifest = Manifest.model_validate(value)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{path}: field {place}: {error.errors()[0]['msg']}; build the dataset again"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); build the dataset again") from None
    if not manifest.is_intact():
        raise UserError(
            f"{path} was changed after it was written (its fingerprint is not its hash); build it again"
        )
    unknown = [name for name in manifest.columns if name not in COLUMNS]
    if unknown or not {"tokens", "loss_mask"} <= set(manifest.columns):
        raise UserError(f"{path} lists the columns {manifest.columns}; build the dataset again")
    return manifest
