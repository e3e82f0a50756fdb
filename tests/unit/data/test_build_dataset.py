"""Rollouts become documents: nothing is lost without a count, and a rerun does nothing or the same."""

import errno
import functools
import json
import os
import resource
import shutil
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd_megatron.data import writer
from lopd_megatron.data.build_dataset import build_dataset, write_dataset
from lopd_megatron.data.filters import LONGEST_PERIOD, REPEATED_TAIL, Filters
from lopd_megatron.data.manifest import Manifest, read_manifest
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.files import sha256_file
from lopd_megatron.lineage import Lineage
from lopd_megatron.records import SCORE_SCHEMA
from lopd_megatron.rollouts import shard_files
from tests.unit.data.samples import documents, files_of, forked, random_rows, row, write_shards

WIDE = Filters(seq_length=1000)


def build(folder: Path, content: list, filters: Filters = WIDE, **options: Any) -> Manifest:
    write_shards(folder / "scores", content, **options)
    return build_dataset(folder / "scores", folder / "dataset" / "train", filters=filters)


def test_one_rollout_followed_to_the_disk(tmp_path: Path) -> None:
    topk = {
        "teacher_topk_ids": [9, 8, 7, 6, 5, 4],
        "teacher_topk_logprobs": [-0.5, -1, -0.25, -2, -0.125, -4],
    }
    build(tmp_path, [[row("a", [11, 12], [21, 22, 23], **topk)]])
    read = open_dataset([tmp_path / "dataset" / "train"]).document(0)
    assert read["tokens"].tolist() == [11, 12, 21, 22, 23]
    assert read["loss_mask"].tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_allclose(read["rollout_logprobs"], [0, 0, -0.1, -0.2, -0.3], rtol=1e-6)
    np.testing.assert_allclose(read["teacher_logprobs"], [0, 0, -0.2, -0.4, -0.6], rtol=1e-6)
    assert read["teacher_topk_ids"].tolist() == [[-1, -1], [-1, -1], [9, 8], [7, 6], [5, 4]]
    assert read["teacher_topk_logprobs"].tolist() == [[0, 0], [0, 0], [-0.5, -1], [-0.25, -2], [-0.125, -4]]


def test_what_the_inference_stage_writes_is_read(tmp_path: Path) -> None:
    rows = [[row("a", [1, 2], [3, 4]), row("b", [1], [5])], [row("c", [1], [6, 7])]]
    for index, values in enumerate(rows):
        shard_files.write_shard(
            tmp_path / "scores",
            index,
            pa.Table.from_pylist(values, SCORE_SCHEMA),
            kind="scores",
            num_shards=len(rows),
            lineage=Lineage(engine={"scores": {"worker": index}}),
        )
    manifest = build_dataset(tmp_path / "scores", tmp_path / "x", filters=WIDE)
    assert manifest.documents == 3
    assert manifest.lineage.engine == {"scores": {"worker": 0}}


def test_rollouts_without_scores_have_no_teacher_column(tmp_path: Path) -> None:
    build(tmp_path, [[row("a", [1], [2, 3])]], kind="rollouts")
    dataset = open_dataset([tmp_path / "dataset" / "train"])
    assert dataset.columns == {"tokens", "loss_mask", "rollout_logprobs"}


LOOP = ([7, 8, 9] * (REPEATED_TAIL + LONGEST_PERIOD))[: REPEATED_TAIL + LONGEST_PERIOD]
ROWS = {
    "good": row("good", [1, 2], [3, 4]),
    "no response": row("empty", [1, 2], []),
    "no prompt": row("bare", [], [3, 4]),
    "too long": row("long", [1] * 500, [2] * 501),
    "nan": row("nan", [1], [2, 3], rollout_logprobs=[-1.0, float("nan")]),
    "inf": row("inf", [1], [2, 3], teacher_logprobs=[-1.0, float("-inf")]),
    "above zero": row("above", [1], [2, 3], teacher_logprobs=[-1.0, 0.5]),
    "cut": row("cut", [1, 2], [3, 4], finish_reason="length"),
    "loop": row("loop", [1, 2], LOOP, finish_reason="length"),
}


@pytest.mark.parametrize(
    ("switches", "documents", "dropped", "kept"),
    [
        pytest.param(
            {},
            3,
            {"truncated": 0, "degenerate_repeat": 0},
            {"truncated": 2, "degenerate_repeat": 1},
            id="count",
        ),
        pytest.param(
            {"drop_truncated": True},
            1,
            {"truncated": 2, "degenerate_repeat": 0},
            {"truncated": 0},
            id="truncated",
        ),
        pytest.param(
            {"drop_repeated": True},
            2,
            {"truncated": 0, "degenerate_repeat": 1},
            {"truncated": 1},
            id="degenerate_repeat",
        ),
    ],
)
def test_everything_left_out_is_counted_once(
    tmp_path: Path, switches: dict, documents: int, dropped: dict, kept: dict
) -> None:
    manifest = build(tmp_path, [list(ROWS.values())], Filters(1000, **switches))
    assert manifest.documents == documents
    assert manifest.dropped == {"empty": 2, "too_long": 1, "non_finite": 3} | dropped
    assert manifest.flagged_kept.items() >= kept.items()
    assert manifest.documents + sum(manifest.dropped.values()) == len(ROWS)


def test_a_loop_needs_its_whole_tail(tmp_path: Path) -> None:
    broken = [*LOOP[:-100], 1, *LOOP[-99:]]
    manifest = build(tmp_path, [[row("a", [1], LOOP), row("b", [1], broken)]])
    assert manifest.flagged_kept["degenerate_repeat"] == 1


def test_all_rollouts_left_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no document is left \(dropped: .*'non_finite': 1"):
        build(tmp_path, [[ROWS["nan"]]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"rollout_logprobs": [-1.0]}, "row 1 has 1 values of rollout_logprobs", id="short"),
        pytest.param({"teacher_topk_ids": [1]}, "row 1 has 1 values of teacher_topk_ids", id="ragged k"),
        pytest.param({"response_tokens": [5, -1]}, "token id -1 is negative", id="negative"),
    ],
)
def test_a_shard_that_cannot_be_right(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path, [[row("a", [1], [2, 3]), row("b", [1], [2, 3], **change)]])
    assert "shard-00000.parquet" in str(caught.value)


def test_a_shard_of_wider_ids_is_refused(tmp_path: Path) -> None:
    """An id beyond 32 bits would come out as another token."""
    folder = write_shards(tmp_path / "scores", [[ROWS["good"]]])
    path = folder / "shard-00000.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("response_tokens")
    wide = pa.array([[2**32 + 5] * len(ROWS["good"]["response_tokens"])], pa.list_(pa.int64()))
    pq.write_table(table.set_column(place, "response_tokens", wide), path)
    value = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(value | {"sha256": sha256_file(path)}))
    with pytest.raises(UserError, match=r"shard-00000.parquet: response_tokens is list<.*int64"):
        build_dataset(folder, tmp_path / "x", filters=WIDE)


def test_a_save_point_that_cannot_be_read_starts_afresh(tmp_path: Path) -> None:
    build(tmp_path, [[ROWS["good"]]])
    whole = files_of(tmp_path / "dataset" / "train")
    folder = tmp_path / "dataset" / "train.building"
    for text in ("", "{", "[]", "{}", '{"settings": 1}'):
        for path in (tmp_path / "dataset").glob("train.*"):
            path.unlink()
        folder.mkdir()
        (folder / "state.json").write_text(text)
        build_dataset(tmp_path / "scores", tmp_path / "dataset" / "train", filters=WIDE)
        assert files_of(tmp_path / "dataset" / "train") == whole


def test_shards_of_different_k(tmp_path: Path) -> None:
    topk = {"teacher_topk_ids": [1, 2], "teacher_topk_logprobs": [-1.0, -1.0]}
    with pytest.raises(UserError, match=r"shard-00001.parquet.*k = 0 teacher tokens, the first file has 1"):
        build(tmp_path, [[row("a", [1], [2, 3], **topk)], [row("b", [1], [2, 3])]])


def test_shards_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    other = Lineage(teacher={"kind": "model", "fingerprint": "f", "origin": "x"})
    write_shards(folder, [[ROWS["good"]]] * 2, lineage=other)
    write_shards(tmp_path / "plain", [[ROWS["good"]]] * 2)
    (tmp_path / "plain" / "shard-00001.json").rename(folder / "shard-00001.json")
    with pytest.raises(UserError, match=r"shard-00001.parquet has another kind, number of shards or lineage"):
        build_dataset(folder, tmp_path / "x", filters=WIDE)


def test_a_shard_copied_over_another(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "scores", [[row("a", [1], [2])], [row("b", [1], [2])]])
    for ending in ("parquet", "json"):
        shutil.copyfile(folder / f"shard-00000.{ending}", folder / f"shard-00001.{ending}")
    with pytest.raises(UserError, match=r"shard-00001.json describes shard 0: a shard was copied"):
        build_dataset(folder, tmp_path / "x", filters=WIDE)
    path = folder / "shard-00001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"index": 1}))
    with pytest.raises(UserError, match=r"shard-00001.parquet holds the document a/0, as does shard-00000"):
        build_dataset(folder, tmp_path / "x", filters=WIDE)


def test_shards_that_disagree_on_their_number(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "scores", [[row("a", [1], [2])], [row("b", [1], [2])]])
    path = folder / "shard-00001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_shards": 3}))
    with pytest.raises(UserError, match="number of shards"):
        build_dataset(folder, tmp_path / "x", filters=WIDE)


def test_a_missing_or_changed_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "scores", [[ROWS["good"]]] * 3)
    kept = (folder / "shard-00001.json").read_text()
    (folder / "shard-00001.json").unlink()
    with pytest.raises(UserError, match="holds 2 of 3 shards"):
        build_dataset(folder, tmp_path / "x", filters=WIDE)
    (folder / "shard-00001.json").write_text(kept)
    with (folder / "shard-00001.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"shard-00001.parquet is not the file that its JSON describes"):
        build_dataset(folder, tmp_path / "x", filters=WIDE)
    with pytest.raises(UserError, match=r"holds no shard-\*\.json"):
        build_dataset(tmp_path / "nothing", tmp_path / "x", filters=WIDE)


def test_a_rerun_does_nothing_and_another_input_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build(tmp_path, [[ROWS["good"]]])
    before = files_of(tmp_path / "dataset" / "train")
    capsys.readouterr()
    assert build(tmp_path, [[ROWS["good"]]]) == first
    assert "already built, 1 documents" in capsys.readouterr().err
    with pytest.raises(UserError, match="from other files"):
        build(tmp_path, [[ROWS["cut"]]])
    with pytest.raises(UserError, match=r"with other data\.\* settings"):
        build(tmp_path, [[ROWS["good"]]], Filters(1000, drop_truncated=True))
    assert files_of(tmp_path / "dataset" / "train") == before


def test_many_shards_keep_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = [random_rows(rng, 20, f"s{i}-") for i in range(4)]
    build(tmp_path, content)
    dataset = open_dataset([tmp_path / "dataset" / "train"])
    dataset.verify()
    rows = [r for shard in content for r in shard if r["response_tokens"]]
    assert len(dataset) == len(rows)
    for index, expected in enumerate(rows):
        tokens = expected["prompt_tokens"] + expected["response_tokens"]
        assert dataset.document(index)["tokens"].tolist() == tokens


def peak_memory(source: Path, prefix: Path, report: Path) -> None:
    """Write the peak of numpy, Python and Arrow memory of a build, in bytes."""
    tracemalloc.start()
    before = pa.default_memory_pool().max_memory()
    build_dataset(source, prefix, filters=WIDE)
    arrow = pa.default_memory_pool().max_memory() - before
    report.write_text(str(tracemalloc.get_traced_memory()[1] + arrow))


@pytest.mark.processes
def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = [[row(f"p{i}", [1] * 50, rng.integers(0, 99, 300).tolist()) for i in range(150)]]
    peaks = []
    for count in (2, 16):
        source = write_shards(tmp_path / f"scored{count}", content * count)
        work = functools.partial(peak_memory, source, tmp_path / f"x{count}", tmp_path / "peak")
        assert forked(work) == 0
        peaks.append(int((tmp_path / "peak").read_text()))
    assert peaks[1] < 1.2 * peaks[0]  # eight times the documents


def test_two_builds_of_one_prefix(tmp_path: Path) -> None:
    with (
        writer.DatasetWriter(tmp_path / "x", ["tokens", "loss_mask"], 0, {}),
        pytest.raises(UserError, match="is in use by another build"),
    ):
        write_dataset(tmp_path / "x", documents(1))


def refusal(prefix: Path) -> str:
    with pytest.raises(UserError) as caught:
        write_dataset(prefix, documents(6, seed=2))
    return str(caught.value)


def test_a_full_disk_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC at the n-th flush to the disk: one line for the user, and the finished dataset stays whole."""
    prefix = tmp_path / "x"
    write_dataset(prefix, documents(5, seed=1))
    before = files_of(prefix)
    real, calls = os.fsync, [0, 0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for calls[1] in range(1, 100):
        calls[0] = 0
        message = refusal(prefix)
        assert "No space left on device; free space on the disk" in message
        if (tmp_path / "x.building" / "manifest.json").exists() or files_of(prefix) != before:
            # Renaming needs no space: all data was on the disk when it failed, and a rerun completes it.
            monkeypatch.setattr(os, "fsync", real)
            writer.finish_interrupted_commit(prefix)
            open_dataset([prefix]).verify()
            break
    assert calls[1] > 10
    assert len(open_dataset([prefix])) == 6


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The superuser may write anywhere but into /sys; everybody else is stopped by the mode."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        folder = Path("/sys")
    with pytest.raises(UserError, match="set another run_dir"):
        write_dataset(folder / "x", documents(1))


@pytest.mark.processes
def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The kernel's own refusal: a child process with a limit on the size of files."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(UserError, match="File too large; raise the limit on file sizes"):
            write_dataset(tmp_path / "x", documents(400))

    assert forked(limited) == 0
    with pytest.raises(UserError, match="is running or was stopped"):
        read_manifest(tmp_path / "x")
