"""Writes a dataset so that a kill at any moment loses at most the last unfinished part, never a finished one.

Everything grows inside `<prefix>.building/`. `save_point` makes what was appended so far durable and notes
how long each file is; a restart truncates the files to the last note and goes on, so the result has the bytes
of an undisturbed build. `commit` writes indices, hashes and the manifest there too, and only then renames the
files into place, the manifest last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from lopd_megatron.data.alignment import Sample
from lopd_megatron.data.column_files import checked_cast, open_column, write_index
from lopd_megatron.data.document_ids import DOCUMENT_IDS, encode_ids
from lopd_megatron.data.manifest import FileEntry, Manifest, building_folder, manifest_path, read_manifest
from lopd_megatron.errors import UserError
from lopd_megatron.files import explained, fsync_path, sha256_file, write_json
from lopd_megatron.lineage import Lineage
from lopd_megatron.progress import log_line
from lopd_megatron.records import COLUMNS, SCHEMA_VERSION

_LENGTHS = "lengths.raw"
_STATE = "state.json"
_LOCK = "lock"
_MANIFEST = "manifest.json"
_SUFFIXES = ("bin", "idx")


class DatasetWriter:
    """Append documents, then `commit`. Use as a context manager; leaving it without `commit` keeps the files
    for a resume.

    `settings` say what is being built: a building folder with other settings is thrown away, not continued.
    With `has_ids` every document has an id (`document_ids`).
    `state` is the caller's own note of the last save point, {} at the start.
    """

    def __init__(
        self,
        prefix: str | Path,
        columns: list[str],
        topk: int,
        settings: dict[str, Any],
        *,
        has_ids: bool = False,
    ) -> None:
        self.prefix = str(prefix)
        self.columns = columns
        self.topk = topk
        self.has_ids = has_ids
        self.folder = building_folder(prefix)
        self.state: dict[str, Any] = {}
        self.documents = self.tokens = self.trained_tokens = 0
        self._settings = json.loads(
            json.dumps(
                {
                    "schema_version": SCHEMA_VERSION,
                    "columns": columns,
                    "topk": topk,
                    "ids": has_ids,
                    "settings": settings,
                }
            )
        )
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> DatasetWriter:
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK).open("w")
            self._take_lock()
            saved = self._read_saved()
            if not saved:
                self._empty_folder()
            sizes = saved.get("sizes", {})
            for name in (*self.columns, _LENGTHS, *self._id_files()):
                self._files[name] = self._open_at(name, sizes.get(name, 0))
        self.state = saved.get("state", {})
        counts = saved.get("counts", [0, 0, 0])
        self.documents, self.tokens, self.trained_tokens = counts
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk was reported where it was met
                file.close()
        self._lock.close()

    def append(
        self, lengths: np.ndarray, values: dict[str, np.ndarray], document_ids: Sequence[str] = ()
    ) -> None:
        """Add documents: `lengths` [n] tokens each, per column all their values end to end, and n ids.

        ValueError where a value does not fit its column, counts differ, a log-prob is not a finite log-prob,
        a first token is trained (nothing stands before it) or no token is.
        """
        lengths = checked_cast(np.asarray(lengths), np.int32, "document length")
        checked = {name: self._checked(name, values[name], int(lengths.sum())) for name in self.columns}
        ids = encode_ids(document_ids) if self.has_ids else b""
        if self.has_ids and len(document_ids) != len(lengths):
            raise ValueError(f"{len(document_ids)} document ids for {len(lengths)} documents")
        if not len(lengths):
            return
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        mask = checked["loss_mask"]
        if lengths.min() < 2:
            raise ValueError("a document needs at least two tokens, one prompt token and one response token")
        if mask[starts].any():
            raise ValueError("the first token of a document cannot be trained: nothing stands before it")
        if not np.add.reduceat(mask, starts, dtype=np.int64).all():
            raise ValueError("a document has no trained token")
        with explained(self.folder):
            for name in self.columns:
                self._files[name].write(checked[name].data)
            self._files[_LENGTHS].write(lengths.data)
            if self.has_ids:
                self._files[DOCUMENT_IDS].write(ids)
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.trained_tokens += int(mask.sum())

    def save_point(self, state: dict[str, Any]) -> None:
        """Make everything so far survive a kill; `state` comes back after a restart."""
        with explained(self.folder):
            sizes = {}
            for name, file in self._files.items():
                file.flush()
                os.fsync(file.fileno())
                sizes[name] = file.tell()
            write_json(
                self.folder / _STATE,
                {
                    "settings": self._settings,
                    "state": state,
                    "sizes": sizes,
                    "counts": [self.documents, self.tokens, self.trained_tokens],
                },
            )
        self.state = state

    def commit(
        self,
        lineage: Lineage,
        *,
        filters: dict[str, Any] | None = None,
        dropped: dict[str, int] | None = None,
        flagged_kept: dict[str, int] | None = None,
        alignment: dict[str, Any] | None = None,
        stops: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        teacher_proof: dict[str, Any] | None = None,
    ) -> Manifest:
        """Turn the building folder into the dataset. The prefix is not touched before all is on disk."""
        if not self.documents:
            raise UserError(f"{self.prefix}: no document is left (dropped: {dropped or {}}); look at data.*")
        with explained(self.folder):
            lengths = self.write_indices()
            files = {}
            for name in self._final_names():
                path = self.folder / name
                files[name] = FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
            manifest = Manifest(
                columns=self.columns,
                topk=self.topk,
                documents=self.documents,
                tokens=self.tokens,
                trained_tokens=self.trained_tokens,
                lengths=length_histogram(lengths),
                filters=filters or {},
                dropped=dropped or {},
                flagged_kept=flagged_kept or {},
                alignment=alignment,
                stops=stops,
                vocab_size=vocab_size,
                teacher_proof=teacher_proof,
                files=files,
                lineage=lineage,
            ).sealed()
            write_json(self.folder / _MANIFEST, manifest.model_dump(mode="json"))
            _move_into_place(self.prefix)
        return manifest

    def write_indices(self) -> np.ndarray:
        """Flush all files and write every `.idx` into the building folder; returns the lengths [n]."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        lengths = np.fromfile(self.folder / _LENGTHS, np.int32)
        for name in self.columns:
            column = COLUMNS[name]
            path = self.folder / f"{name}.idx"
            with path.open("wb") as file:
                write_index(file, lengths, column.dtype, self.topk if column.per_topk else 1)
            fsync_path(path)
        return lengths

    def samples(self, documents: list[int]) -> list[Sample]:
        """Documents that were appended, read back from the files, for the alignment check."""
        lengths = self.write_indices()
        stops = np.cumsum(lengths, dtype=np.int64)
        names = ["tokens", "loss_mask", "rollout_logprobs"]
        names += ["teacher_logprobs"] if "teacher_logprobs" in self.columns else []
        columns = {name: open_column(str(self.folder / name), COLUMNS[name].dtype).values for name in names}
        ids = (self.folder / DOCUMENT_IDS).read_text().splitlines() if self.has_ids else None
        return [
            Sample.of(
                index,
                {
                    name: values[stops[index] - lengths[index] : stops[index]]
                    for name, values in columns.items()
                },
                ids[index] if ids else "",
            )
            for index in documents
        ]

    def _checked(self, name: str, values: np.ndarray, tokens: int) -> np.ndarray:
        column = COLUMNS[name]
        array = np.ascontiguousarray(checked_cast(np.asarray(values), column.dtype, name)).reshape(-1)
        need = tokens * (self.topk if column.per_topk else 1)
        if array.size != need:
            raise ValueError(f"{name} has {array.size} values, its documents have {need}")
        if name == "tokens" and array.size and array.min() < 0:
            raise ValueError(f"token id {array.min()} is negative")
        if name == "loss_mask" and array.size and array.max() > 1:
            raise ValueError(f"loss_mask holds {array.max()}; 0 and 1 are allowed")
        numbers = array.view(np.float16) if name == "teacher_topk_logprobs" else array
        if numbers.dtype.kind == "f" and not are_logprobs(numbers).all():
            bad = numbers[np.flatnonzero(~are_logprobs(numbers))[0]]
            raise ValueError(f"{name} holds {bad}, which is no log-prob (finite, at most 0)")
        return array

    def _final_names(self) -> list[str]:
        columns = [f"{name}.{suffix}" for name in self.columns for suffix in _SUFFIXES]
        return [*columns, *self._id_files()]

    def _id_files(self) -> list[str]:
        return [DOCUMENT_IDS] if self.has_ids else []

    def _open_at(self, name: str, size: int) -> BinaryIO:
        path = self._path(name)
        file = path.open("r+b" if path.exists() else "w+b")
        file.truncate(size)
        file.seek(size)
        return file

    def _path(self, name: str) -> Path:
        """Where a column, the lengths or the ids are while they grow."""
        return self.folder / (name if name in (_LENGTHS, DOCUMENT_IDS) else f"{name}.bin")

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is in use by another build; wait for it or stop it") from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                raise
            log_line(f"{self.folder}: this file system has no locks; do not start a second build of it")

    def _read_saved(self) -> dict[str, Any]:
        """The last save point, {} where there is none that fits these settings and these files."""
        path = self.folder / _STATE
        if not path.is_file():
            return {}
        try:
            saved = json.loads(path.read_text())
            settings, sizes = saved["settings"], dict(saved["sizes"])
        except (ValueError, KeyError, TypeError):
            log_line(f"{path} is not a save point: starting afresh")
            return {}
        if settings != self._settings:
            log_line(f"{self.folder} was made with other settings: starting afresh")
            return {}
        for name, size in sizes.items():
            file = self._path(name)
            if not file.is_file() or file.stat().st_size < size:
                log_line(f"{file} is shorter than its save point: starting afresh")
                return {}
        return saved

    def _empty_folder(self) -> None:
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                path.unlink()


def finish_interrupted_commit(prefix: str | Path) -> None:
    """Complete a commit that was killed while its files were moved into place."""
    folder = building_folder(prefix)
    with explained(folder):
        if (folder / _MANIFEST).is_file():
            _move_into_place(str(prefix))
        elif manifest_path(prefix).is_file() and folder.is_dir() and set(os.listdir(folder)) <= {_LOCK}:
            shutil.rmtree(folder)


def _move_into_place(prefix: str) -> None:
    """Rename every file, the manifest last; idempotent, so a killed run of it is simply run again."""
    folder, final = building_folder(prefix), manifest_path(prefix)
    manifest = Manifest.model_validate_json((folder / _MANIFEST).read_text())
    # From here to the last rename the prefix has no manifest: a reader sees no dataset, never a mixed one.
    final.unlink(missing_ok=True)
    for name in manifest.files:
        if (folder / name).exists():
            os.replace(folder / name, f"{prefix}.{name}")
    fsync_path(final.parent)
    for name in (_STATE, _LENGTHS):
        (folder / name).unlink(missing_ok=True)
    os.replace(folder / _MANIFEST, final)
    fsync_path(final.parent)
    shutil.rmtree(folder)


def existing_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of the finished dataset at `prefix`, after completing an interrupted commit; else None."""
    finish_interrupted_commit(prefix)
    return read_manifest(prefix) if manifest_path(prefix).exists() else None


def are_logprobs(values: np.ndarray) -> np.ndarray:
    """Finite and at most 0; engines round, so a hair above 0 passes."""
    return np.isfinite(values) & (values <= 1e-3)


def length_histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """64 equal bins from 0 to the longest document."""
    step = max(1, -(-(int(lengths.max(initial=0)) + 1) // 64))
    edges = np.arange(0, 65) * step
    counts = np.bincount(lengths // step, minlength=64)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
