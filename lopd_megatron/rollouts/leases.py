"""Which worker makes which shard, over a shared folder and nothing else.

A lease is a file, `shard-00003.lease`; its age is the time since its holder last showed
progress. A lease that is too old, or whose process on this machine is gone, may be taken by anyone. Two
workers that take one lease at the same instant both make the shard: it comes out the same, so leases save
work and are not needed for correctness.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from pathlib import Path

LEASE_SECONDS = 300.0


class Leases:
    """The leases of one worker in one folder."""

    def __init__(self, folder: Path, seconds: float = LEASE_SECONDS) -> None:
        self.folder = folder
        self.seconds = seconds
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._held: set[int] = set()
        self._renewed = time.monotonic()

    def path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.lease"

    def take(self, index: int) -> bool:
        """True when shard `index` is now this worker's."""
        path = self.path(index)
        if self._is_abandoned(path):
            path.unlink(missing_ok=True)
        # A hard link is exclusive on NFS too, and the lease appears with its content.
        whole = self.folder / f".lease-{self._owner['id']}"
        whole.write_text(json.dumps(self._owner))
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        finally:
            whole.unlink()
        self._held.add(index)
        return True

    def renew(self) -> None:
        """Say that this worker makes progress; cheap enough to call at every step of an engine."""
        if time.monotonic() - self._renewed < self.seconds / 10:
            return
        self._renewed = time.monotonic()
        for index in self._held:
            with contextlib.suppress(FileNotFoundError):  # another worker took it for abandoned
                os.utime(self.path(index))

    def release(self, index: int) -> None:
        """Give a finished shard's lease back."""
        self._held.discard(index)
        self.path(index).unlink(missing_ok=True)

    def release_all(self) -> None:
        for index in list(self._held):
            self.release(index)

    def clear(self) -> None:
        """Remove what killed workers left; only when every shard is finished."""
        for path in self.folder.glob("shard-*.lease"):
            path.unlink(missing_ok=True)

    def _is_abandoned(self, path: Path) -> bool:
        try:
            age = self._file_time() - path.stat().st_mtime
            owner = json.loads(path.read_text())
        except FileNotFoundError:
            return False
        if owner["host"] == self._owner["host"] and not _is_alive(owner["pid"]):
            return True
        return age > self.seconds

    def _file_time(self) -> float:
        """Now by the clock of the file server, which stamps the leases."""
        probe = self.folder / f".clock-{self._owner['id']}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
