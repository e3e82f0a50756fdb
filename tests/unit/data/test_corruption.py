"""Six hundred single faults in a finished dataset: each is refused, by a message that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.manifest import Manifest, read_manifest
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.fingerprints import model_fingerprint, tokenizer_fingerprint
from lopd_megatron.lineage import Lineage, check_consistency
from tests.unit.data.samples import documents, save_model, save_vocabulary

Fault = Callable[[Path, np.random.Generator], str]
"""Damage a copy of the dataset `train`; returns the name of the file that the message must hold."""


def data_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("train.*.bin"), *folder.glob("train.*.idx")])


def flip_bit(folder: Path, rng: np.random.Generator) -> str:
    path = data_files(folder)[rng.integers(len(data_files(folder)))]
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return path.name


def flip_bit_of_manifest(folder: Path, rng: np.random.Generator) -> str:
    path = folder / "train.manifest.json"
    content = bytearray(path.read_bytes().rstrip())  # the newline at the end means nothing
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    if same_json(bytes(content), path.read_bytes()):
        content[0] ^= 1
    path.write_bytes(content)
    return path.name


def same_json(first: bytes, second: bytes) -> bool:
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


def truncate(folder: Path, rng: np.random.Generator) -> str:
    path = data_files(folder)[rng.integers(len(data_files(folder)))]
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content))])
    return path.name


def append(folder: Path, rng: np.random.Generator) -> str:
    path = data_files(folder)[rng.integers(len(data_files(folder)))]
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 40))))
    return path.name


def remove(folder: Path, rng: np.random.Generator) -> str:
    path = [*data_files(folder), folder / "train.manifest.json"][rng.integers(len(data_files(folder)) + 1)]
    path.unlink()
    return path.name


def swap_columns(folder: Path, rng: np.random.Generator) -> str:
    """Two columns of one dtype change places, values and index."""
    pair = [("teacher_logprobs", "rollout_logprobs"), ("tokens", "teacher_topk_ids")][rng.integers(2)]
    for suffix in ("bin", "idx"):
        first, second = (folder / f"train.{name}.{suffix}" for name in pair)
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)
    return "train."


def swap_documents(folder: Path, rng: np.random.Generator) -> str:
    """Two documents of one column change places; sizes and lengths stay."""
    dataset = open_dataset([folder / "train"])
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(dataset.lengths.tolist()):
        by_length.setdefault(length, []).append(index)
    pairs = [places[:2] for places in by_length.values() if len(places) > 1]
    first, second = pairs[rng.integers(len(pairs))]
    offsets, length = dataset.prefixes[0].offsets, int(dataset.lengths[first])
    path = folder / "train.teacher_logprobs.bin"
    values = np.fromfile(path, np.float32)
    a, b = (slice(offsets[i], offsets[i] + length) for i in (first, second))
    values[a], values[b] = values[b].copy(), values[a].copy()
    values.tofile(path)
    return path.name


def edit_manifest(folder: Path, rng: np.random.Generator) -> str:
    """One value is edited by hand, the rest left alone."""
    path = folder / "train.manifest.json"
    value = json.loads(path.read_text())
    edits: list[tuple[str, object]] = [
        ("documents", value["documents"] + 1),
        ("tokens", value["tokens"] - 1),
        ("trained_tokens", 7),
        ("topk", value["topk"] + 1),
        ("columns", value["columns"][:-1]),
        ("columns", ["tokens"]),
        ("dropped", {"empty": 3}),
        ("schema_version", 2),
        ("schema_version", "1"),
        ("lineage", {"teacher": {"kind": "model", "fingerprint": "f", "origin": "x"}}),
        ("lineage", {"unknown": 1}),
        ("files", {}),
        ("kind", "model"),
        ("fingerprint", "0" * 64),
        ("unknown_field", 1),
    ]
    name, new = edits[rng.integers(len(edits))]
    value[name] = new
    path.write_text(json.dumps(value))
    return path.name


def wrong_count(folder: Path, rng: np.random.Generator) -> str:
    """A manifest that is sealed but says another number of documents or another width than the files."""
    path = folder / "train.manifest.json"
    manifest = Manifest.model_validate_json(path.read_text())
    change = [{"documents": manifest.documents + 1}, {"topk": manifest.topk + 1}][rng.integers(2)]
    path.write_text(manifest.model_copy(update=change).sealed().model_dump_json())
    return "train."


FAULTS: list[tuple[Fault, int]] = [
    (flip_bit, 150),
    (flip_bit_of_manifest, 90),
    (truncate, 90),
    (append, 50),
    (remove, 40),
    (swap_columns, 20),
    (swap_documents, 30),
    (edit_manifest, 60),
    (wrong_count, 20),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_dataset(folder / "train", documents(40, seed=3, longest=30, topk=1))
    return folder


@pytest.mark.parametrize(("fault", "count"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_fault_is_refused(good: Path, ram_path: Path, fault: Fault, count: int) -> None:
    for seed in range(count):
        folder = ram_path / str(seed)
        shutil.copytree(good, folder)
        name = fault(folder, np.random.default_rng(seed))
        with pytest.raises(UserError) as caught:
            open_dataset([folder / "train"]).verify()
        assert str(folder / name) in str(caught.value)
        shutil.rmtree(folder)


def test_the_undamaged_copy_passes(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "copy")
    open_dataset([tmp_path / "copy" / "train"]).verify()


def test_other_models_are_refused(tmp_path: Path) -> None:
    """Fifty datasets each with another teacher, student or tokenizer than the run's."""
    student, teacher = save_model(tmp_path / "student", seed=1), save_model(tmp_path / "teacher", seed=2)
    lineage = Lineage(
        generator=model_fingerprint(student),
        teacher=model_fingerprint(teacher),
        sft_teacher=model_fingerprint(teacher),
        tokenizer=tokenizer_fingerprint(student),
    )
    prefix = tmp_path / "train"
    write_dataset(prefix, documents(3), lineage)
    known = read_manifest(prefix).lineage
    check_consistency(student=student, teacher=teacher, data=known, data_origin=prefix)
    for seed in range(50):
        other = save_model(tmp_path / f"other{seed}", seed=100 + seed)
        models = [student, teacher]
        if seed % 3 < 2:
            models[seed % 3] = other
        else:
            models = [Path(shutil.copytree(path, tmp_path / f"{path.name}{seed}")) for path in models]
            for path in models:
                save_vocabulary(path, ("<pad>", "a", "b", f"word{seed}"))
        with pytest.raises(UserError) as caught:
            check_consistency(student=models[0], teacher=models[1], data=known, data_origin=prefix)
        message = str(caught.value)
        assert str(prefix) in message
        assert "lineage.allow_mismatch=REASON" in message
