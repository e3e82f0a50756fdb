"""A document keeps its id: from the shard through the build to every message that names it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.data.build_dataset import build_dataset, write_dataset
from lopd_megatron.data.document_ids import DOCUMENT_IDS, encode_ids
from lopd_megatron.data.documents import document_of
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.held_out import HeldOut
from lopd_megatron.data.in_memory import memory_dataset
from lopd_megatron.data.inspection import document_lines
from lopd_megatron.data.loader import StepLoader
from lopd_megatron.data.manifest import manifest_path, read_manifest
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from tests.unit.data.samples import documents, files_of, random_rows, write_shards


@pytest.fixture(scope="module")
def rows() -> dict[str, list[int]]:
    """Document id → its tokens, of 150 rollouts in three shards, some of them empty or too long."""
    rng = np.random.default_rng(3)
    return {row["document_id"]: row for shard in range(3) for row in random_rows(rng, 50, f"s{shard}p")}


@pytest.fixture(scope="module")
def built(rows: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ids")
    found = list(rows.values())
    scores = write_shards(folder / "scores", [found[:50], found[50:100], found[100:]])
    (folder / "dataset").mkdir()
    prefix = folder / "dataset" / "train"
    build_dataset(scores, prefix, filters=Filters(30), held_out=HeldOut(0.21))
    return prefix


def test_the_id_leads_back_to_the_rollout(rows: dict, built: Path) -> None:
    total = 0
    for part in ("train", "valid"):
        dataset = open_dataset([built.with_name(part)])
        assert DOCUMENT_IDS in dataset.manifests[0].files
        for index in range(len(dataset)):
            name = dataset.document_label(index).removeprefix(f"{index} (").removesuffix(")")
            row = rows[name]
            assert dataset.document(index)["tokens"].tolist() == row["prompt_tokens"] + row["response_tokens"]
        total += len(dataset)
        dataset.verify()
    assert 50 < total < 150  # documents were left out, so an id is not a row number


def test_over_several_datasets(built: Path) -> None:
    parts = [built, built.with_name("valid")]
    both, valid = open_dataset(parts), open_dataset(parts[1:])
    size = len(both) - len(valid)
    assert both.document_label(size).split("(")[1] == valid.document_label(0).split("(")[1]


def test_messages_name_it(built: Path) -> None:
    dataset = open_dataset([built])
    assert next(document_lines(dataset, 4, None, False)).startswith(f"document {dataset.document_label(4)}: ")
    longest = int(dataset.lengths.argmax())
    settings = {"seed": 1, "global_batch_size": 8, "data_parallel_rank": 0, "data_parallel_size": 1}
    with pytest.raises(UserError) as caught:
        StepLoader(dataset, micro_batch_size=1, seq_length=8, **settings)
    assert str(caught.value).startswith(f"document {dataset.document_label(longest)} has ")
    batch = StepLoader(dataset, micro_batch_size=1, seq_length=64, **settings).step(0)
    assert batch.document_label(4) == dataset.document_label(4)


def test_a_changed_id_is_found(built: Path, tmp_path: Path) -> None:
    for name, content in files_of(built).items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / f"train.{DOCUMENT_IDS}"
    path.write_bytes(path.read_bytes().replace(b"s1p", b"s2p", 1))
    dataset = open_dataset([tmp_path / "train"])
    with pytest.raises(UserError, match=rf"train\.{DOCUMENT_IDS} was changed"):
        dataset.verify()


def test_a_dataset_without_ids_opens(built: Path, tmp_path: Path) -> None:
    """As version 0.1.0 wrote it."""
    for name, content in files_of(built).items():
        if not name.endswith(DOCUMENT_IDS):
            (tmp_path / name).write_bytes(content)
    manifest = read_manifest(built)
    files = {name: entry for name, entry in manifest.files.items() if name != DOCUMENT_IDS}
    old = manifest.model_copy(update={"files": files}).model_dump(
        mode="json", exclude={"fingerprint", "stops", "vocab_size", "teacher_proof"}
    )
    old["kept"] = old.pop("flagged_kept")
    old["fingerprint"] = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    write_json(manifest_path(tmp_path / "train"), old)
    dataset = open_dataset([tmp_path / "train"])
    dataset.verify()
    assert dataset.document_label(3) == "3"
    assert dataset.manifests[0].flagged_kept == manifest.flagged_kept
    old["kept"] = {"truncated": 99}
    write_json(manifest_path(tmp_path / "train"), old)
    with pytest.raises(UserError, match="was changed after it was written"):
        open_dataset([tmp_path / "train"])


def test_documents_of_a_program(tmp_path: Path) -> None:
    made = [dataclasses.replace(d, document_id=f"mine/{i}") for i, d in enumerate(documents(5))]
    write_dataset(tmp_path / "named", made)
    assert open_dataset([tmp_path / "named"]).document_label(2) == "2 (mine/2)"
    assert memory_dataset(made).document_label(2) == "2 (mine/2)"
    write_dataset(tmp_path / "plain", documents(5))
    assert DOCUMENT_IDS not in read_manifest(tmp_path / "plain").files
    with pytest.raises(ValueError, match="not one line"):
        write_dataset(tmp_path / "mixed", [made[0], *documents(1)])
    with pytest.raises(ValueError, match="not one line"):
        encode_ids(["two\nlines"])


def test_prompt_tokens_of_a_made_document_have_the_values_of_the_schema() -> None:
    values = np.array([-1.0, -2.0], np.float32)
    ids = np.array([[7], [8]], np.int32)
    found = document_of("p/0", [1, 2, 3], [4, 5], teacher_logprobs=values, teacher_topk_ids=ids)
    assert found.loss_mask.tolist() == [0, 0, 0, 1, 1]
    assert found.teacher_logprobs is not None
    assert found.teacher_topk_ids is not None
    assert found.teacher_logprobs.tolist() == [0, 0, 0, -1, -2]
    assert found.teacher_topk_ids.tolist() == [[-1], [-1], [-1], [7], [8]]
