"""Which checkpoint a run continues from."""

import io
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.model.checkpoint_files import (
    DESCRIPTION,
    LATEST,
    HashingFile,
    damage,
    inspect,
    list_iterations,
    newest,
    newest_undamaged,
    seal,
)
from lopd_megatron.model.checkpoint_reader import newest_checkpoint
from lopd_megatron.parallel import safe_pickles
from lopd_megatron.train.checkpoint import Checkpoints, refuse_other_input, remove_leftovers
from lopd_megatron.train.checkpoint_state import changed_settings


def write(folder: Path, iteration: int) -> Path:
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    with HashingFile(path / "__0_0.distcp") as file:
        file.write(b"weights")
    torch.save({"iteration": iteration}, path / "common.pt")
    (path / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": BytesStorageMetadata()})))
    seal(path, {"iteration": iteration})
    return path


def found(folder: Path) -> int | None:
    description = newest(folder)
    return description["iteration"] if description else None


def test_the_pointer_decides_and_its_absence_means_the_newest(tmp_path: Path) -> None:
    assert found(tmp_path) is None
    for iteration in (3, 6, 9):
        write(tmp_path, iteration)
    assert found(tmp_path) == 9
    (tmp_path / LATEST).write_text("6\n")
    assert found(tmp_path) == 6
    (tmp_path / LATEST).write_text("six")
    assert found(tmp_path) == 9


def test_torn_checkpoints_are_skipped_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = [write(tmp_path, iteration) for iteration in (1, 2, 3, 4)]
    (paths[3] / DESCRIPTION).unlink()
    (paths[2] / "__0_0.distcp").write_bytes(b"weigh")
    (paths[1] / "__0_0.distcp").unlink()
    write_json(
        paths[0] / DESCRIPTION, {"iteration": 1, "files": {"__0_0.distcp": 7}}
    )  # of an earlier version
    assert found(tmp_path) == 1
    warnings = capsys.readouterr().err
    for problem in ("no readable checkpoint.json", "has 5 bytes instead of 7", "__0_0.distcp is missing"):
        assert problem in warnings
    assert inspect(paths[0])[1] == ""


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".iter_0000002.1a2b3c4d.tmp", ".iter_0000000.old"):
        (tmp_path / name).mkdir()
    (tmp_path / f".{LATEST}.77.tmp").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001"]


def test_old_checkpoints_are_deleted_and_a_rolled_back_run_keeps_its_own(tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path))
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_every = 4
    topology: Any = None
    checkpoints = Checkpoints(config, topology)
    for iteration in (2, 4, 6, 8, 10, 20, 30):  # 20 and 30: the pointer was set back to 8
        write(checkpoints.folder, iteration)
    checkpoints._delete_old(10)
    assert list_iterations(checkpoints.folder) == [4, 8, 10, 20, 30]


def test_another_model_is_refused_by_name() -> None:
    stored = {"fingerprint": "a" * 64, "origin": "models/first"}
    refuse_other_input(Path("c"), "model", stored, {"fingerprint": "a" * 64, "origin": "moved/first"})
    refuse_other_input(Path("c"), "model", stored, None)
    with pytest.raises(UserError, match=r"another model: models/first \(a{16}\).*models/second"):
        refuse_other_input(Path("c"), "model", stored, {"fingerprint": "b" * 64, "origin": "models/second"})


def test_a_pointer_to_nothing_and_torn_checkpoints_alone_are_errors(tmp_path: Path) -> None:
    paths = [write(tmp_path, iteration) for iteration in (3, 6)]
    (tmp_path / LATEST).write_text("9\n")
    with pytest.raises(
        UserError, match=r"names iteration 9, but .*iter_0000009 is gone.*iteration 6, write 6 into the file"
    ):
        newest(tmp_path)
    (tmp_path / LATEST).unlink()
    for path in paths:
        (path / DESCRIPTION).write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        newest(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / LATEST).write_text("9\n")
    with pytest.raises(UserError, match=r"names iteration 9.*another run_dir"):
        newest(empty)


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In every file, also in checkpoint.json; the checkpoint before it is taken, and the file is named."""
    older, path = write(tmp_path, 1), write(tmp_path, 2)
    rng = random.Random(0)
    for name in sorted(os.listdir(path)):
        content = (path / name).read_bytes()
        for _ in range(20):
            position = rng.randrange(len(content))
            flipped = bytearray(content)
            flipped[position] ^= 1 << rng.randrange(8)
            (path / name).write_bytes(flipped)
            assert newest_undamaged(tmp_path) == older, (name, position)
            assert newest_checkpoint(tmp_path) == older
            assert name in capsys.readouterr().err
        for cut in (0, len(content) // 2):
            (path / name).write_bytes(content[:cut])
            assert newest_undamaged(tmp_path) == older
        (path / name).write_bytes(content)
    assert newest_undamaged(tmp_path) == path
    (path / "common.pt").unlink()
    (path / "metadata.json").write_text("{}")  # named itself, a torn checkpoint is refused
    with pytest.raises(UserError, match=r"common\.pt is missing"):
        newest_checkpoint(path)


def test_the_hash_is_that_of_the_file_and_is_not_left_behind(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    description, problem = inspect(path)
    assert problem == damage(path, description) == ""
    assert sorted(os.listdir(path)) == [".metadata", "__0_0.distcp", DESCRIPTION, "common.pt"]


def test_a_checkpoint_of_an_earlier_version_is_checked_by_its_formats(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    names = (".metadata", "common.pt")
    for name in names:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])
        sizes = {other: (path / other).stat().st_size for other in names}
        write_json(path / DESCRIPTION, {"iteration": 5, "files": sizes})
        assert f"{name} cannot be read" in inspect(path)[1]
        (path / name).write_bytes(content)


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """Planted in files whose sizes and hashes are right; the stock reader runs it."""
    proof = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()
    proof.rmdir()
    for name, dump in (
        (".metadata", lambda file: file.write_bytes(pickle.dumps(Payload(proof)))),
        ("common.pt", lambda file: torch.save(Payload(proof), file)),
    ):
        path = write(tmp_path / name, 1)
        (path / DESCRIPTION).unlink()
        dump(path / name)
        seal(path, {"iteration": 1})
        assert f"{name} cannot be read: it names posix.mkdir, which no checkpoint needs" in inspect(path)[1]
    assert not proof.exists()


@pytest.mark.parametrize("name", ["os.system", "Metadata.__init__.__globals__", "_StorageInfo.__reduce__"])
def test_metadata_may_name_torch_s_descriptions_only(name: str) -> None:
    for module in (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch",
    ):
        with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs"):
            safe_pickles.MetadataUnpickler(io.BytesIO()).find_class(module, name)


FULL_DISK = """
import resource, signal, sys
from lopd_megatron.model.checkpoint_files import HashingFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    with HashingFile(sys.argv[1]) as file:
        try:
            for _ in range(4):
                file.write(bytes(1 << 20))
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # torch's serializer does this
except OSError as error:
    print(error)
"""


@pytest.mark.processes
def test_the_disk_s_own_error_survives_torch_s_serializer(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    ran = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True)
    assert ran.stdout == f"[Errno 27] File too large: '{path}'\n", ran.stderr


def test_changed_settings_are_said_and_another_seed_is_refused() -> None:
    stored, current = (RunConfig().model_dump(mode="json") for _ in range(2))
    del stored["optimizer"]["clip_grad"]  # a setting that a newer version added
    current["train"] |= {"global_batch_size": 64, "log_interval": 7}
    current["optimizer"]["lr"] = 1e-4
    assert changed_settings(stored, current, 3) == [
        "changed from iteration 4 on: optimizer.lr 2e-06 -> 0.0001",
        "changed from iteration 4 on: train.global_batch_size 256 -> 64; the schedule goes by iteration, "
        "the data go on after the last sequence",
    ]
    current["train"]["seed"] = 1
    with pytest.raises(UserError, match=r"train\.seed=1, .* trained with 1234"):
        changed_settings(stored, current, 3)
