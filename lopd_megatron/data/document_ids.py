"""`<prefix>.document_ids.txt`: line i is the id of document i, which leads back to its prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

DOCUMENT_IDS = "document_ids.txt"
"""In the `files` of a manifest, where the dataset has ids."""


def encode_ids(ids: Sequence[str]) -> bytes:
    """The lines of n ids; ValueError where one is not a single line."""
    for name in ids:
        if not name or not name.isprintable():
            raise ValueError(f"document id {name!r} is not one line of text")
    return "".join(f"{name}\n" for name in ids).encode()


def read_id(prefix: str, place: int) -> str:
    """The id of one document. Reads the file up to its line."""
    with Path(f"{prefix}.{DOCUMENT_IDS}").open(encoding="utf-8") as lines:
        return next(itertools.islice(lines, place, None)).rstrip("\n")


def document_label(index: int, document_id: str) -> str:
    """How messages name a document: `17 (8f3a…/0)`, or `17` where it has no id."""
    return f"{index} ({document_id})" if document_id else str(index)
