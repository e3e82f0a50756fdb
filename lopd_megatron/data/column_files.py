"""One column on disk: the `.bin`/`.idx` pair of `megatron.core.datasets.indexed_dataset`, byte for byte.

    .bin   raw values, back to back
    .idx   magic, u64 version, u8 dtype, u64 n, u64 n+1, int32 lengths[n], int64 pointers[n], int64 marks[n+1]

One sequence per document. Megatron's own reader unmaps the file when it is collected, under the feet of the
arrays it gave out (a segfault), its writer casts silently and keeps Python lists of every length. Here a view
keeps its map alive, a value that does not fit is refused, and lengths are one int32 array.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lopd_megatron.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[type[np.generic], int] = {
    np.uint8: 1,
    np.int8: 2,
    np.int16: 3,
    np.int32: 4,
    np.int64: 5,
    np.float64: 6,
    np.float32: 7,
    np.uint16: 8,
}


def write_index(file: BinaryIO, lengths: np.ndarray, dtype: type[np.generic], per_token: int = 1) -> None:
    """Write the `.idx` of documents with `lengths` tokens, `per_token` values each."""
    counts = checked_cast(lengths.astype(np.int64) * per_token, np.int32, "document length")
    pointers = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, dtype=np.int64, out=pointers[1:])
    pointers *= np.dtype(dtype).itemsize
    file.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], len(counts), len(counts) + 1))
    file.write(counts.tobytes())
    file.write(pointers[:-1].tobytes())
    file.write(np.arange(len(counts) + 1, dtype=np.int64).tobytes())


@dataclass(frozen=True)
class IndexedColumn:
    """A column, mapped. Views of `values` stay valid as long as they are referenced."""

    values: np.ndarray  # [sum of lengths · per_token]
    lengths: np.ndarray  # int32 [n], in values


def open_column(prefix: str, dtype: type[np.generic]) -> IndexedColumn:
    """Map `<prefix>.bin/.idx`; UserError where the pair is not whole or of another dtype."""
    index_path, values_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    lengths = _read_lengths(index_path, dtype)
    expected = int(lengths.sum(dtype=np.int64)) * np.dtype(dtype).itemsize
    size = values_path.stat().st_size if values_path.is_file() else -1
    if size != expected:
        found = f"has {size} bytes" if size >= 0 else "does not exist"
        raise UserError(f"{index_path} asks for {expected} bytes, {values_path} {found}; build it again")
    # A plain array over the map: slicing a np.memmap costs five times as much.
    values = np.asarray(np.memmap(values_path, dtype, mode="r")) if size else np.empty(0, dtype)
    return IndexedColumn(values, lengths)


def _read_lengths(path: Path, dtype: type[np.generic]) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} does not exist; build the dataset again")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or header[:9] != _MAGIC:
        raise UserError(f"{path} is not an index of Megatron's IndexedDataset; build the dataset again")
    _, version, code, count, documents = _HEADER.unpack(header)
    if (version, code, documents) != (1, _CODES[dtype], count + 1):
        raise UserError(
            f"{path} has version {version}, dtype code {code} and {documents} marks for {count} documents; "
            f"version 1, code {_CODES[dtype]} and {count + 1} are needed; build the dataset again"
        )
    expected = _HEADER.size + 4 * count + 8 * count + 8 * (count + 1)
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes, {count} documents need {expected}; build the dataset again"
        )
    if not count:
        return np.empty(0, np.int32)
    return np.asarray(np.memmap(path, np.int32, mode="r", offset=_HEADER.size, shape=(count,)))


def checked_cast(values: np.ndarray, dtype: type[np.generic], what: str) -> np.ndarray:
    """`values` in `dtype`; ValueError where a value would change. Float64 may round to float32."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    rounding = values.dtype.kind == "f" and np.dtype(dtype).kind == "f"
    same = np.isclose(cast, values, rtol=1e-6, atol=0, equal_nan=True) if rounding else cast == values
    if not np.all(same):
        bad = values[np.flatnonzero(~same)[0]]
        raise ValueError(f"{what} {bad} does not fit {np.dtype(dtype).name}")
    return cast
