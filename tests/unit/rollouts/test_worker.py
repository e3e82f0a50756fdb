"""The worker of a sharded stage: nothing lost, nothing doubled, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from lopd_megatron.config import EngineConfig
from lopd_megatron.errors import UserError
from lopd_megatron.inference.requests import document_seed
from lopd_megatron.records import ROLLOUT_SCHEMA, SCORE_SCHEMA
from lopd_megatron.rollouts import shard_files, worker
from lopd_megatron.rollouts.leases import Leases
from tests.unit.rollouts import pipeline
from tests.unit.rollouts.fake_engine import FakeEngine, fake_logprob


@pytest.fixture
def reference(tmp_path: Path) -> dict[str, str]:
    """Hashes of an undisturbed run."""
    root = tmp_path.parent / f"{tmp_path.name}-reference"
    pipeline.run_all(root)
    return pipeline.hashes(root)


def documents(root: Path, kind: str) -> list[dict]:
    schema = ROLLOUT_SCHEMA if kind == "rollouts" else SCORE_SCHEMA
    rows = []
    for index in range(pipeline.NUM_SHARDS):
        rows += shard_files.read_table(root / kind, index, schema).to_pylist()
    return rows


def test_every_document_once_and_aligned(tmp_path: Path) -> None:
    pipeline.run_all(tmp_path)
    rollouts, scored = documents(tmp_path, "rollouts"), documents(tmp_path, "scores")
    names = [row["document_id"] for row in rollouts]
    assert len(set(names)) == len(names) == pipeline.NUM_PROMPTS * pipeline.NUM_SAMPLES
    assert names == [row["document_id"] for row in scored]
    for row in scored:
        tokens, start = row["prompt_tokens"] + row["response_tokens"], len(row["prompt_tokens"])
        want = [fake_logprob(tokens, t) for t in range(start, len(tokens))]
        assert row["teacher_logprobs"] == pytest.approx(want)
        assert len(row["teacher_topk_ids"]) == 2 * len(want) == len(row["teacher_topk_logprobs"])


def test_few_requests_are_in_flight_and_shards_overlap(tmp_path: Path) -> None:
    pipeline.make_prompts(tmp_path)
    engine = FakeEngine(slots=7)
    pipeline.rollout_worker(tmp_path).run(engine, pipeline.CONFIG, lambda config: FakeEngine())
    assert engine.most_in_flight == 7


def test_a_document_is_the_same_in_any_shard_or_batch(tmp_path: Path) -> None:
    pipeline.run_all(tmp_path)
    rows = documents(tmp_path, "rollouts")
    stage = pipeline.rollout_stage()
    for row in rows[:5]:
        table = shard_files.read_table(tmp_path / "prompts", 0, stage.source_schema)
        for request in stage.requests(0, table):
            if stage.document_id(table, request.key[1]) == row["document_id"]:
                (alone,) = FakeEngine(slots=1).generate([request], stage.sampling)
                assert alone.response_tokens == row["response_tokens"]  # type: ignore[union-attr]
    assert document_seed(1, "a/0") != document_seed(1, "a/1") != document_seed(2, "a/1")


def test_failing_documents_are_tried_again_then_set_aside(tmp_path: Path, reference: dict[str, str]) -> None:
    pipeline.make_prompts(tmp_path)
    once = FakeEngine(failures={(0, 1): 1, (2, 0): 1})
    assert pipeline.rollout_worker(tmp_path).run(once, pipeline.CONFIG, lambda config: once) == 0
    found = pipeline.hashes(tmp_path)
    assert found == {name: reference[name] for name in found}
    always = FakeEngine(failures={(1, 0): 99})
    failed = pipeline.score_worker(tmp_path).run(always, pipeline.CONFIG, lambda config: always)
    assert failed == 1
    aside = json.loads(shard_files.failures_path(tmp_path / "scores", 1).read_text())
    missing = {r["document_id"] for r in documents(tmp_path, "rollouts")} - {
        r["document_id"] for r in documents(tmp_path, "scores")
    }
    assert set(aside) == missing
    assert list(aside.values()) == ["fake failure of (1, 0)"]
    manifest = shard_files.read_manifest(tmp_path / "scores", 1)
    assert manifest is not None
    assert manifest["failed"] == 1


def test_out_of_memory_halves_the_batch_and_loses_nothing(tmp_path: Path, reference: dict[str, str]) -> None:
    pipeline.make_prompts(tmp_path)
    opened: list[EngineConfig] = []

    def open_engine(config: EngineConfig) -> FakeEngine:
        opened.append(config)
        return FakeEngine(lose_after=9 if len(opened) == 1 else None)

    first = FakeEngine(lose_after=3)
    pipeline.rollout_worker(tmp_path).run(first, pipeline.CONFIG, open_engine)
    assert first.closed
    assert [config.max_num_batched_tokens for config in opened] == [512, 256]
    assert [config.max_num_seqs for config in opened] == [2, 1]
    found = pipeline.hashes(tmp_path)
    assert found == {name: reference[name] for name in found}


def test_an_engine_that_always_dies_ends_with_advice(tmp_path: Path) -> None:
    pipeline.make_prompts(tmp_path)
    with pytest.raises(UserError, match="smallest batch"):
        pipeline.rollout_worker(tmp_path).run(
            FakeEngine(lose_after=0), pipeline.CONFIG, lambda config: FakeEngine(lose_after=0)
        )
    assert not list((tmp_path / "rollouts").glob("*.lease"))


def test_workers_share_the_shards(
    tmp_path: Path, reference: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    pipeline.make_prompts(tmp_path)
    engines = [FakeEngine(), FakeEngine(), FakeEngine()]

    def run(number: int) -> None:
        work = pipeline.rollout_worker(tmp_path, worker=(number, 3))
        work.run(engines[number], pipeline.CONFIG, lambda config: FakeEngine())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = pipeline.hashes(tmp_path)
    assert found == {name: reference[name] for name in found}
    assert len([name for name in found if "rollouts" in name]) == 2 * pipeline.NUM_SHARDS
    assert sum(engine.answered for engine in engines) == pipeline.NUM_PROMPTS * pipeline.NUM_SAMPLES
    assert not list((tmp_path / "rollouts").glob("*.lease"))


def test_an_expired_lease_is_taken_and_a_live_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    pipeline.make_prompts(tmp_path)
    (tmp_path / "rollouts").mkdir()
    other = Leases(tmp_path / "rollouts", seconds=0.3)
    assert other.take(1)  # this process lives, so only age can free it
    start = time.monotonic()
    mine = pipeline.rollout_worker(tmp_path, leases=Leases(tmp_path / "rollouts", seconds=0.3))
    assert mine.run(FakeEngine(), pipeline.CONFIG, lambda config: FakeEngine()) == 0
    assert time.monotonic() - start > 0.2


@pytest.mark.processes
def test_a_lease_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    owner = {"host": os.uname().nodename, "pid": child, "id": "x"}
    leases.path(0).write_text(json.dumps(owner))
    assert leases.take(0)
    assert not Leases(tmp_path).take(0)
    leases.path(1).write_text(json.dumps(owner | {"host": "elsewhere"}))
    assert not leases.take(1)
    old = time.time() - leases.seconds - 5
    os.utime(leases.path(1), (old, old))
    assert leases.take(1)


def test_renewing_keeps_a_lease(tmp_path: Path) -> None:
    mine, other = Leases(tmp_path, seconds=60), Leases(tmp_path, seconds=60)
    assert mine.take(0)
    old = time.time() - 100
    os.utime(mine.path(0), (old, old))
    mine.renew()  # too soon after the last time to write again
    assert mine.path(0).stat().st_mtime == pytest.approx(old, abs=1)
    mine._renewed -= 10
    mine.renew()
    assert not other.take(0)
    os.utime(mine.path(0), (old, old))
    assert other.take(0)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    pipeline.run_all(tmp_path)
    with pytest.raises(UserError, match=r"another sampling \(seed was 1, now 2\)"):
        worker.Worker(
            pipeline.rollout_stage(seed=2), tmp_path / "prompts", tmp_path / "rollouts", pipeline.NUM_SHARDS
        )
    with pytest.raises(UserError, match="4 shards, now 5"):
        worker.Worker(pipeline.rollout_stage(), tmp_path / "prompts", tmp_path / "rollouts", 5)


def test_a_shard_that_was_changed_or_not_finished_is_refused(tmp_path: Path) -> None:
    pipeline.run_all(tmp_path)
    folder = tmp_path / "rollouts"
    shard_files.parquet_path(folder, 0).write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not the file that its JSON describes"):
        shard_files.read_table(folder, 0, ROLLOUT_SCHEMA)
    shard_files.manifest_path(folder, 1).unlink()
    with pytest.raises(UserError, match="3 of 4 shards of rollouts"):
        shard_files.complete_manifests(folder, "rollouts")
    with pytest.raises(UserError, match="holds scores"):
        shard_files.complete_manifests(tmp_path / "scores", "rollouts")
    with pytest.raises(UserError, match=r"0 of 1 shards of prompts; run lopd prompts"):
        shard_files.complete_manifests(tmp_path / "nowhere", "prompts")


def edit_manifest(folder: Path, shard: int, **fields: object) -> None:
    path = shard_files.manifest_path(folder, shard)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def copy_shard(folder: Path, source: int, target: int) -> None:
    for path in (shard_files.parquet_path, shard_files.manifest_path):
        shutil.copyfile(path(folder, source), path(folder, target))


def test_a_shard_copied_over_another_is_refused(tmp_path: Path) -> None:
    pipeline.run_all(tmp_path)
    for kind in ("prompts", "rollouts", "scores"):
        folder = tmp_path / kind
        shard_files.complete_manifests(folder, kind)
        copy_shard(folder, 0, 1)
        with pytest.raises(UserError, match="describes shard 0: a shard was copied over another"):
            shard_files.complete_manifests(folder, kind)
        edit_manifest(folder, 1, index=1)
        with pytest.raises(UserError, match=r"shard-00001.parquet holds the document .* as does shard-00000"):
            shard_files.complete_manifests(folder, kind)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_shards": 5}, r"two runs \(4 shards in shard-00000.json, 5 in shard-00001.json"),
        ({"num_shards": 1}, "num_shards 1"),
        ({"kind": "scores"}, "two runs .prompts in"),
        ({"lineage": {}}, "two runs .* another lineage"),
        ({"rows": "4"}, "rows '4'"),
        ({"sha256": None}, "sha256 None"),
    ],
)
def test_jsons_of_another_run_are_refused(tmp_path: Path, fields: dict, message: str) -> None:
    pipeline.make_prompts(tmp_path)
    edit_manifest(tmp_path / "prompts", 1, **fields)
    with pytest.raises(UserError, match=message):
        shard_files.complete_manifests(tmp_path / "prompts", "prompts")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_json_is_one_line(tmp_path: Path, data: bytes) -> None:
    pipeline.make_prompts(tmp_path)
    shard_files.manifest_path(tmp_path / "prompts", 1).write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00001.json is not the JSON of a shard"):
        pipeline.rollout_worker(tmp_path).run(FakeEngine(), pipeline.CONFIG, lambda config: FakeEngine())


def test_a_damaged_or_missing_parquet_is_one_line(tmp_path: Path) -> None:
    pipeline.make_prompts(tmp_path)
    path = shard_files.parquet_path(tmp_path / "prompts", 1)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"shard-00001.parquet cannot be read"):
        shard_files.complete_manifests(tmp_path / "prompts", "prompts")
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00001.parquet cannot be read"):
        shard_files.complete_manifests(tmp_path / "prompts", "prompts")


def test_a_copied_json_by_another_name(tmp_path: Path) -> None:
    pipeline.make_prompts(tmp_path)
    folder = tmp_path / "prompts"
    shutil.copyfile(shard_files.manifest_path(folder, 0), folder / "shard-00000 (copy).json")
    with pytest.raises(UserError, match="is not the name of a shard"):
        shard_files.complete_manifests(folder, "prompts")
