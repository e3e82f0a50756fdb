"""Files that are either whole or absent: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lopd_megatron.errors import UserError

ADVICE = {
    errno.ENOSPC: "free space on the disk and start the same command again; what is done is kept",
    errno.EDQUOT: "free some of your quota and start the same command again; what is done is kept",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and start the same command again",
    errno.EROFS: "the file system is read-only: set another run_dir or folder",
    errno.EACCES: "you do not have the permission: change it, or set another run_dir or folder",
    errno.EPERM: "you do not have the permission: change it, or set another run_dir or folder",
    errno.EEXIST: "a file has the name of a folder that is needed: set another run_dir or folder",
    errno.ENOTDIR: "a file has the name of a folder that is needed: set another run_dir or folder",
    errno.EISDIR: "a folder has the name of a file that is needed: set another run_dir or folder",
}
"""What a user can do about an errno; other errors of the file system keep their traceback."""


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line for the user; `path` where the error names none."""
    try:
        yield
    except OSError as error:
        line = advice(error, path)
        if line is None:
            raise
        raise UserError(line) from error


def advice(error: OSError, path: Path | None = None) -> str | None:
    """One line: the file, what the file system refused, what to do; None where there is no advice."""
    if error.errno not in ADVICE:
        return None
    return f"{error.filename or path or 'writing'}: {error.strerror}; {ADVICE[error.errno]}"


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on any error it is removed.

    A reader sees the old file or the new one, never a part. The name carries the process id, so two
    writers of one path cannot tear each other's temporary file. A full disk, a read-only folder or a missing
    permission is a UserError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; constant memory."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
