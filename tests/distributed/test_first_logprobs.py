"""Before its first step a run finds the log-probs of its rollouts again, under every layout, or is refused.

The rollouts are scored by transformers. Right runs differ by float32 rounding, below 1e-4 nats; each planted
fault gives more than 0.1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.documents import Document
from lopd_megatron.errors import UserError
from lopd_megatron.fingerprints import model_fingerprint
from lopd_megatron.lineage import Lineage
from lopd_megatron.train.metrics import read_metrics
from lopd_megatron.train.state import Hook, Trainer
from tests.distributed import tiny_hf
from tests.distributed.tiny_run import layout, tiny_config
from tests.distributed.world import run_world

pytestmark = pytest.mark.dist
PROMPT = 3


def write_rollouts(folder: Path, family: str) -> None:
    """`student`, `train` with the log-probs of transformers on random documents, and wrong datasets."""
    from lopd_megatron.recipes import tiny_task

    model = tiny_hf.save_model(family, folder / "student")
    tiny_task.save_tokenizer(folder / "student")
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(20, 41, (24,), generator=generator).tolist()
    texts = tiny_hf.documents(tuple(lengths), seed=7)
    values = []
    for text, logits in zip(texts, tiny_hf.reference_logits(model, texts), strict=True):
        logprobs = logits[:-1].log_softmax(-1).gather(1, text[1:, None])[:, 0]
        values.append(np.append(np.zeros(PROMPT), logprobs[PROMPT - 1 :].numpy()).astype(np.float32))
    start = model_fingerprint(folder / "student")
    sampled = {"rollouts": {"dtype": "float32"}}

    def write(
        name: str,
        tokens: list[np.ndarray],
        stored: list[np.ndarray],
        made_by: dict[str, str] | None = start,
        teacher: list[np.ndarray] | None = None,
    ) -> None:
        documents = [
            Document(text, (np.arange(len(text)) >= PROMPT).astype(np.uint8), 1.2 * scored, value)
            for text, scored, value in zip(tokens, teacher or stored, stored, strict=True)
        ]
        write_dataset(folder / name, documents, Lineage(generator=made_by, engine=sampled))

    ids = [text.numpy().astype(np.int32) for text in texts]
    write("train", ids, values)
    shifted = [np.append(np.zeros(PROMPT + 1, np.float32), value[PROMPT:-1]) for value in values]
    write("shifted_column", ids, shifted)
    # As from a tokenizer with one special token more in front.
    write("other_tokenizer", [(text + 1) % tiny_hf.VOCABULARY for text in ids], values)
    exchanged = [values[1], values[0], *values[2:]]
    exchanged[0], exchanged[1] = (np.resize(v, len(i)) for v, i in zip(exchanged[:2], ids[:2], strict=True))
    for value in exchanged[:2]:
        value[:PROMPT] = 0
    write("exchanged_documents", ids, exchanged)
    write("shifted_teacher", ids, values, start, shifted)
    write("unknown_generator", ids, shifted, None, values)


class Plant(Hook):
    """What a bug in reading the weights would do, to the model of the run and to nothing else."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def on_start(self, trainer: Trainer) -> None:
        for chunk in trainer.model:
            getattr(self, self.fault)(chunk.module)

    def head(self, student: Any) -> None:
        """The head of another checkpoint."""
        if student.post_process:
            generator = torch.Generator().manual_seed(1)
            weight = student.output_layer.weight.data
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator).to(weight.dtype))

    def rope_theta(self, student: Any) -> None:
        """10,000 instead of 1,000,000 and the like: frequencies raised to another power."""
        student.rotary_pos_emb.inv_freq.pow_(0.67)

    def rope_scaling(self, student: Any) -> None:
        """A scaling by 4 that was left out."""
        student.rotary_pos_emb.inv_freq.mul_(4)

    def layers(self, student: Any) -> None:
        """Two layers of this stage exchanged."""
        first, second = student.decoder.layers[:2]
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            kept = one.data.clone()
            one.data.copy_(other.data)
            other.data.copy_(kept)


MODEL_FAULTS = ("head", "rope_theta", "rope_scaling", "layers")
DATA_FAULTS = {
    "shifted_column": "the stored values stand one token too late",
    "other_tokenizer": "another model, tokenizer or another text",
    "exchanged_documents": "documents are wrong and the others right",
    "shifted_teacher": "teacher_logprobs stand one token too late",
}
LAYOUTS = {
    "TP2 PP2": ("qwen3", layout(tp=2, pp=2)),
    "TP2 PP2, bf16": ("qwen3", layout(tp=2, pp=2, train__precision="bf16")),
    "TP2 PP2 VPP2": ("qwen3", layout(tp=2, pp=2, vpp=2)),
    "PP4, plain head": ("qwen3", layout(pp=4, loss__head="plain")),
    "DP4": ("qwen3", layout()),
    "CP2 TP2": ("qwen3", layout(tp=2, parallel__context_parallel_size=2)),
    "CP2 DP2, rope scaling": ("llama31", layout(parallel__context_parallel_size=2)),
    "EP2 PP2": ("qwen3_moe", layout(ep=2, pp=2)),
}


def start(folder: str, run_dir: str, dataset: str, fault: str = "", **settings: Any) -> str:
    """The text of the refusal; empty where the run came to its end."""
    from lopd_megatron.parallel import topology as grid
    from lopd_megatron.train.loop import run

    grid.destroy()
    config = tiny_config(Path(folder), Path(run_dir), **({"train__train_iters": 1} | settings))
    config.data.prefixes = [f"{folder}/{dataset}"]
    try:
        run(config, hooks=[Plant(fault)] if fault else [])
    except UserError as error:
        return str(error)
    return ""


def start_all(root: str, runs: str) -> dict[str, str]:
    found = {}
    for name, (family, settings) in LAYOUTS.items():
        found[name] = start(f"{root}/{family}", f"{runs}/{name}", "train", **settings)
    qwen3, usual = f"{root}/qwen3", layout(tp=2, pp=2)
    for fault in MODEL_FAULTS:
        found[fault] = start(qwen3, f"{runs}/{fault}", "train", fault, **usual)
    found["head, bf16"] = start(
        qwen3, f"{runs}/head, bf16", "train", "head", **usual, train__precision="bf16"
    )
    for name in (*DATA_FAULTS, "unknown_generator"):
        found[name] = start(qwen3, f"{runs}/{name}", name, **usual)
    found["switched off"] = start(qwen3, f"{runs}/off", "shifted_column", train__start_tolerance=0, **usual)
    found["resumed"] = start(qwen3, f"{runs}/TP2 PP2", "train", "head", **(usual | {"train__train_iters": 2}))
    found["sft"] = start(qwen3, f"{runs}/sft", "shifted_column", loss__objective="sft", **usual)
    return found


def test_a_run_finds_the_logprobs_of_its_rollouts_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for family in {family for family, _ in LAYOUTS.values()}:
        write_rollouts(tmp_path / family, family)
    runs = tmp_path / "runs"
    results = run_world(start_all, 4, str(tmp_path), str(runs))
    assert all(result == results[0] for result in results)  # the same words on every rank
    found = results[0]

    for name in LAYOUTS:
        assert found[name] == "", name
        record = json.loads((runs / name / "first_logprobs.json").read_text())
        print(
            f"{name:22s} {record['root_mean_square']:.1e} {record['mean_difference']:+.1e}",
            record["seconds"],
        )
        assert record["root_mean_square"] < (0.05 if "bf16" in name else 1e-4), name
        assert record["documents"] == 8
        assert record["generator_is_start"]
    (checkpoint,) = (runs / "DP4" / "checkpoints").glob("iter_*/checkpoint.json")
    assert json.loads(checkpoint.read_text())["first_logprobs"]["root_mean_square"] < 1e-4

    for name in (*MODEL_FAULTS, *DATA_FAULTS, "head, bf16"):
        assert found[name], name
        assert "\n" not in found[name]
        assert read_metrics(runs / name / "metrics.jsonl") == [], f"{name}: a step was taken"
        if name == "shifted_teacher":
            continue
        assert "the trainer does not find rollout_logprobs again" in found[name], name
        print(json.loads((runs / name / "first_logprobs.json").read_text())["root_mean_square"], name)
    for name, diagnosis in DATA_FAULTS.items():
        assert diagnosis in found[name], found[name]

    assert found["unknown_generator"] == ""  # told, not refused
    record = json.loads((runs / "unknown_generator" / "first_logprobs.json").read_text())
    assert "one token too late" in record["diagnosis"]
    assert not record["generator_is_start"]
    assert found["switched off"] == found["sft"] == found["resumed"] == ""
    assert not (runs / "off" / "first_logprobs.json").exists()
    newest = sorted((runs / "TP2 PP2" / "checkpoints").glob("iter_*/checkpoint.json"))[-1]
    assert "first_logprobs" in json.loads(newest.read_text())
