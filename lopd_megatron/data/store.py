"""Opens datasets for reading: mapped columns, nothing copied, quick checks at open, full ones in `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lopd_megatron.data.column_files import IndexedColumn, open_column
from lopd_megatron.data.document_ids import DOCUMENT_IDS, document_label, read_id
from lopd_megatron.data.manifest import Manifest, manifest_path, read_manifest
from lopd_megatron.data.vocabulary import first_foreign
from lopd_megatron.data.writer import are_logprobs
from lopd_megatron.errors import UserError
from lopd_megatron.files import sha256_file
from lopd_megatron.records import COLUMNS

_VERIFY_BLOCK = 1 << 22


class DocumentColumns:
    """Columns of documents end to end. `values[name]` is a whole column, `offsets` [n + 1] are in tokens."""

    def __init__(
        self,
        prefix: str,
        values: dict[str, np.ndarray],
        lengths: np.ndarray,
        topk: int,
        document_ids: Sequence[str] = (),
    ) -> None:
        self.prefix = prefix
        self._ids = document_ids
        self.values = values
        self.lengths = lengths
        self.topk = topk
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def width(self, name: str) -> int:
        """Values per token of a column."""
        return self.topk if COLUMNS[name].per_topk else 1

    def document_id(self, place: int) -> str:
        """The id of a document; empty where the documents have none."""
        return self._ids[place] if self._ids else ""


class MappedDataset(DocumentColumns):
    """One dataset on disk, its columns mapped."""

    def __init__(self, prefix: str) -> None:
        self.manifest: Manifest = read_manifest(prefix)
        for name, entry in self.manifest.files.items():
            path = Path(f"{prefix}.{name}")
            size = path.stat().st_size if path.is_file() else None
            if size != entry.bytes:
                found = "does not exist" if size is None else f"has {size} bytes"
                raise UserError(f"{path} {found}, {manifest_path(prefix)} says {entry.bytes}; build it again")
        columns = {
            name: open_column(f"{prefix}.{name}", COLUMNS[name].dtype) for name in self.manifest.columns
        }
        values = {name: column.values for name, column in columns.items()}
        super().__init__(prefix, values, np.asarray(columns["tokens"].lengths), self.manifest.topk)
        for name, column in columns.items():
            self._check_lengths(name, column)

    def document_id(self, place: int) -> str:
        """The id of a document; empty in a dataset of a version that kept none."""
        return read_id(self.prefix, place) if DOCUMENT_IDS in self.manifest.files else ""

    def verify(self, vocab_size: int | None = None) -> None:
        """Hash every byte and check every value; a UserError names the file. Reads the whole dataset once.

        With `vocab_size` an id of a token or of the top-k at or above it is refused, with its document.
        """
        for name, entry in self.manifest.files.items():
            path = Path(f"{self.prefix}.{name}")
            if sha256_file(path) != entry.sha256:
                raise UserError(
                    f"{path} was changed after it was written (not the hash in "
                    f"{manifest_path(self.prefix)}); build the dataset again"
                )
        for name, column in self.values.items():
            for start in range(0, len(column), _VERIFY_BLOCK):
                block = column[start : start + _VERIFY_BLOCK]
                if not _are_valid(name, block):
                    raise UserError(f"{self.prefix}.{name}.bin holds an impossible value; build it again")
                if vocab_size is not None and name in ("tokens", "teacher_topk_ids"):
                    self._check_ids(name, block, start, vocab_size)

    def _check_ids(self, name: str, block: np.ndarray, start: int, vocab_size: int) -> None:
        place = first_foreign(block, vocab_size)
        if place is None:
            return
        token = (start + place) // self.width(name)
        document = int(np.searchsorted(self.offsets, token, side="right")) - 1
        raise UserError(
            f"{self.prefix}, document {document}, token {token - int(self.offsets[document])}: {name} holds "
            f"{block[place]}, the vocabulary of model.student has {vocab_size} ids; build the dataset from "
            "rollouts and scores of models with this vocabulary"
        )

    def _check_lengths(self, name: str, column: IndexedColumn) -> None:
        path, manifest = f"{self.prefix}.{name}.idx", self.manifest
        if len(column.lengths) != manifest.documents:
            raise UserError(
                f"{path} has {len(column.lengths)} documents, {manifest_path(self.prefix)} says "
                f"{manifest.documents}; build the dataset again"
            )
        if not np.array_equal(column.lengths, self.lengths * self.width(name)):
            raise UserError(
                f"{path} has other document lengths than {self.prefix}.tokens.idx; build it again"
            )


Span = tuple[DocumentColumns, int, int]


class ConcatDataset:
    """Documents of one or several prefixes, one after another. Values are token-aligned."""

    def __init__(self, prefixes: Sequence[DocumentColumns]) -> None:
        self.prefixes = prefixes
        self.lengths = np.concatenate([part.lengths for part in prefixes])  # int32 [n], tokens
        self.columns = frozenset.intersection(*(frozenset(part.values) for part in prefixes))
        self.topk = prefixes[0].topk
        self._first = np.cumsum([0, *(len(part.lengths) for part in prefixes)])

    def __len__(self) -> int:
        return len(self.lengths)

    def locate(self, index: int) -> tuple[DocumentColumns, int]:
        """The prefix that holds document `index`, and the document's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.prefixes[part], index - int(self._first[part])

    def document_label(self, index: int) -> str:
        """How messages name a document: its index and, where it has one, its id."""
        part, place = self.locate(index)
        return document_label(index, part.document_id(place))

    def spans(self, documents: np.ndarray) -> list[Span]:
        """Where the columns of many documents lie: (part, first token, token behind the last) of each."""
        parts = np.searchsorted(self._first, documents, side="right") - 1
        places = (documents - self._first[parts]).tolist()
        found = []
        for part_index, place in zip(parts.tolist(), places, strict=True):
            part = self.prefixes[part_index]
            found.append((part, int(part.offsets[place]), int(part.offsets[place + 1])))
        return found

    def document(self, index: int) -> dict[str, np.ndarray]:
        """Column → values of one document of s tokens: [s], or [s, k]; top-k log-probs as float16. Views."""
        part, place = self.locate(index)
        start, stop = part.offsets[place], part.offsets[place + 1]
        found = {}
        for name in sorted(self.columns):
            width = part.width(name)
            values = part.values[name][start * width : stop * width]
            if name == "teacher_topk_logprobs":
                values = values.view(np.float16)
            found[name] = values.reshape(-1, width) if COLUMNS[name].per_topk else values
        return found

    @property
    def manifests(self) -> list[Manifest]:
        return [part.manifest for part in self.prefixes if isinstance(part, MappedDataset)]

    def verify(self, vocab_size: int | None = None) -> None:
        """Full check of all prefixes; see `MappedDataset.verify`."""
        for part in self.prefixes:
            if isinstance(part, MappedDataset):
                part.verify(vocab_size)


def open_dataset(prefixes: Sequence[str | Path]) -> ConcatDataset:
    """Open finished datasets. Costs milliseconds and no memory: pages are shared with all other readers.

    UserError where a file is missing, short, or not what the manifest says; only `verify` hashes bytes.
    """
    if not prefixes:
        raise UserError("no dataset is given; set data.prefixes or build one with lopd dataset")
    parts = [MappedDataset(str(prefix)) for prefix in prefixes]
    for part in parts[1:]:
        if part.topk != parts[0].topk:
            raise UserError(
                f"{part.prefix} has k = {part.topk} teacher tokens, {parts[0].prefix} has {parts[0].topk}; "
                "train on datasets of one k"
            )
    return ConcatDataset(parts)


def _are_valid(name: str, values: np.ndarray) -> bool:
    if name == "teacher_topk_logprobs":
        return bool(are_logprobs(values.view(np.float16)).all())
    if COLUMNS[name].dtype == np.float32:
        return bool(are_logprobs(values).all())
    if name == "loss_mask":
        return int(values.max(initial=0)) <= 1
    return int(values.min(initial=0)) >= (-1 if COLUMNS[name].per_topk else 0)
