"""What the tests of the data stage share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tiny forwards: threads that wait for each other on a busy machine cost ten times the work.
torch.set_num_threads(1)


@pytest.fixture
def ram_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory: hundreds of small builds, each with a dozen fsyncs, would wait for the disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="lopd_megatron_") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints of test models stay out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
