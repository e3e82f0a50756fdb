"""Seeded faults in every file of a model folder: refused, noticed by the fingerprint, or harmless."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lopd_megatron.errors import UserError
from tests.distributed.world import run_world
from tests.helpers.wild_folders import random_model, sharded

FAULTS = 400
ROUNDING = 1e-5


def _flip(data: bytearray, at: int, rng: random.Random) -> bytes:
    return bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])


def _swap(data: bytearray, at: int, rng: random.Random) -> bytes:
    other = rng.randrange(len(data))
    data[at], data[other] = data[other], data[at]
    return bytes(data)


CHANGES: dict[str, Callable[[bytearray, int, random.Random], bytes]] = {
    "flip": _flip,
    "swap": _swap,
    "cut": lambda data, at, rng: data[:at],
    "zero": lambda data, at, rng: data[:at] + bytes(len(data[at : at + 8])) + data[at + 8 :],
    "insert": lambda data, at, rng: data[:at] + bytes([rng.randrange(256)]) + data[at:],
    "repeat": lambda data, at, rng: data[: at + 20] + data[at:],
    "append": lambda data, at, rng: data + b"x",
}


def write_source(folder: Path) -> None:
    random_model("Qwen3", head_dim=16).save_pretrained(folder)
    sharded(folder)
    vocabulary = {chr(97 + index): index for index in range(26)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))


def damage(folder: Path, rng: random.Random) -> str:
    """Change one file; mostly near its beginning, where headers are."""
    file = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice([*CHANGES, "delete"])
    if kind == "delete":
        file.unlink()
        return f"{file.name} deleted"
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data) if rng.random() < 0.3 else min(len(data), 3000))
    file.write_bytes(CHANGES[kind](data, at, rng))
    return f"{file.name} {kind} at {at}"


def outcomes(out: str, faults: int) -> tuple[Counter[str], list[str]]:
    """How often each outcome was, and the faults that changed a result without a word."""
    from lopd_megatron.config import RunConfig
    from lopd_megatron.fingerprints import model_fingerprint, tokenizer_fingerprint
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.student_spec import student_spec
    from lopd_megatron.model.verify import fixed_documents, student_logits
    from lopd_megatron.model.weights import load_hf
    from lopd_megatron.parallel import topology as grid

    config = RunConfig()
    config.train.precision = "fp32"
    config.model.attention = "sdpa"
    topology = grid.initialize(config.parallel, seed=1)

    def everything(folder: Path) -> tuple[Any, Any]:
        prints = [read(folder)["fingerprint"] for read in (model_fingerprint, tokenizer_fingerprint)]
        spec = student_spec(folder, config)
        chunks = build_student(spec, topology)
        load_hf(chunks, folder, spec, topology)
        return prints, student_logits(chunks, fixed_documents(200, (16, 33)), topology)

    source, broken = Path(out) / "source", Path(out) / "broken"
    write_source(source)
    prints, logits = everything(source)
    rng = random.Random(0)
    counts: Counter[str] = Counter()
    silent = []
    for _ in range(faults):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(source, broken)
        what = damage(broken, rng)
        try:
            found, changed = everything(broken)
        except UserError as error:
            counts["refused" if "\n" not in str(error) else "refused in several lines"] += 1
            continue
        same = all(
            a.shape == b.shape and (a - b).abs().max() < ROUNDING
            for a, b in zip(changed, logits, strict=True)
        )
        counts["noticed" if found != prints else "harmless"] += 1
        if found == prints and not same:
            silent.append(what)
    return counts, silent


@pytest.mark.dist
def test_no_fault_changes_a_result_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any error but a UserError, and a fault that hangs, ends the rank and fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ((counts, silent),) = run_world(outcomes, 1, str(tmp_path), FAULTS, timeout_s=120)
    print(dict(counts))
    assert silent == []
    assert sum(counts.values()) == FAULTS
    assert set(counts) == {"refused", "noticed", "harmless"}
    assert counts["refused"] > FAULTS / 2
    assert counts["noticed"] > FAULTS / 20
