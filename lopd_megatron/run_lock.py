"""One writer of one output: a lock file that names its holder and that a dead holder does not keep.

The file appears by a hard link, which is exclusive on NFS too, and whole. Whether the holder lives is known
on its own host from the process id and the start time of the process. On another host it is known from the
heartbeat: the holder sets the file's time every `BEAT_S`; no change within `WATCH_S` means dead. Opening the
file makes an NFS client ask the server for its time, and only changes are looked at, so clocks need not
agree. A host that loses its network for longer than that may lose its lock; it notices at its next beat, and
the program ends at once. File systems without hard links (some FUSE) are refused nothing: a line warns.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from lopd_megatron.errors import UserError
from lopd_megatron.files import explained
from lopd_megatron.progress import log_line

BEAT_S = 10.0
WATCH_S = 75.0
"""More than the 60 s for which an NFS client may answer from its cache."""


@contextlib.contextmanager
def run_lock(path: Path, program: str) -> Iterator[None]:
    """Hold `path` as the only `program` inside; UserError naming the holder where there is one.

    Waits up to `WATCH_S` only where a holder on another host may be dead. Two programs that find the same
    dead holder at the same instant are told apart by the content of the file.
    """
    lock = _Lock(path, program)
    lock.take()
    try:
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, path: Path, program: str) -> None:
        self.path = path
        self.me = {**this_process(), "program": program, "id": uuid.uuid4().hex}
        self.held = False
        self._released = threading.Event()
        self._new_folders: list[Path] = []

    def take(self) -> None:
        with explained(self.path):
            self._new_folders = [p for p in (self.path.parent, *self.path.parent.parents) if not p.exists()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._link():
                holder = read_holder(self.path)
                if holder is None:  # released meanwhile
                    continue
                if is_alive(self.path, holder):
                    raise UserError(self._refusal(holder))
                log_line(f"the holder of {self.path} is dead ({describe(holder)}): taking over")
                self._remove(holder)
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        self._released.set()
        if self.held and (read_holder(self.path) or {}).get("id") == self.me["id"]:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # those that are still empty: nothing was written
            for folder in self._new_folders:
                folder.rmdir()

    def _link(self) -> bool:
        whole = self.path.with_name(f".{self.path.name}.{self.me['id']}.tmp")
        try:
            whole.write_text(json.dumps(self.me))
            os.link(whole, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS) or self.path.exists():
                raise
            log_line(
                f"{self.path.parent}: this file system has no links; "
                f"do not start a second {self.me['program']}"
            )
            return True
        finally:
            whole.unlink(missing_ok=True)
        self.held = True
        return True

    def _remove(self, dead: dict[str, Any]) -> None:
        """Move a dead holder's file away; what another program has put there meanwhile is put back."""
        aside = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if read_holder(aside) != dead:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _beat(self) -> None:
        while self.held and not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):
                holder = read_holder(self.path)
                if self._released.is_set():
                    return
                if holder is not None and holder.get("id") != self.me["id"]:
                    print(f"error: {self._refusal(holder)} It took over from this process.", file=sys.stderr)
                    os._exit(2)
                os.utime(self.path)

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"{self.path.parent} is in use by {describe(holder)}; stop it, wait for it, or choose another "
            f"run_dir (remove {self.path.name} only if that process is gone)."
        )


def this_process() -> dict[str, Any]:
    """What tells this process from every other one, also after a reboot and among containers."""
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.stat("/proc/self/ns/pid").st_ino,
        "pid": os.getpid(),
        "ticks": start_ticks(os.getpid()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process().create_time())),
    }


def start_ticks(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; None where it is gone.

    Unlike a time of day it does not move when the clock is set.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def describe(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "an unreadable holder"
    return (
        f"{holder.get('program', 'a program')} on {holder.get('host')}, process {holder['pid']}, "
        f"started {holder.get('started')}"
    )


def read_holder(path: Path) -> dict[str, Any] | None:
    """The content of a lock; None where there is no lock, {} where it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def is_alive(path: Path, holder: dict[str, Any]) -> bool:
    """Whether the holder runs: at once for a process of this host, by its heartbeat elsewhere."""
    me = this_process()
    if all(holder.get(name) == me[name] for name in ("boot", "namespace")):
        return start_ticks(holder["pid"]) == holder["ticks"]
    log_line(f"{path} is held by {describe(holder)}: looking for its heartbeat for up to {WATCH_S:.0f} s")
    first = _file_time(path)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(BEAT_S, WATCH_S) / 4)
        now = _file_time(path)
        if now is None:
            return False
        if now != first:
            return True
    return False


def _file_time(path: Path) -> int | None:
    try:
        with path.open("rb") as handle:
            return os.fstat(handle.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
