"""Small model folders for tests."""

from __future__ import annotations

from pathlib import Path

from lopd_megatron.files import write_json
from lopd_megatron.lineage import LINEAGE_FILE, Lineage


def write_model_lineage(folder: str | Path, lineage: Lineage) -> None:
    """Give a model folder the `lineage.json` that an export writes."""
    write_json(Path(folder) / LINEAGE_FILE, lineage.model_dump())
