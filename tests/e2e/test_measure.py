"""`measure` with vLLM against transformers: the exact KL over the vocabulary of the same responses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.config import EngineConfig, RunConfig
from lopd_megatron.records import SCORE_SCHEMA
from lopd_megatron.rollouts import shard_files
from tests.e2e.random_models import reference, save_model

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
from lopd_megatron.config import RunConfig

def run() -> RunConfig:
    return RunConfig.model_validate_json({text!r})
"""


@pytest.mark.slow
def test_both_estimates_against_transformers(tmp_path: Path) -> None:
    models = {name: save_model(tmp_path / name, 1) for name in ("student", "teacher")}
    with_noise = models["teacher"]
    import torch

    torch.manual_seed(5)
    with torch.no_grad():
        for weight in with_noise.parameters():
            weight += 0.03 * torch.randn_like(weight)
    with_noise.save_pretrained(tmp_path / "teacher")
    config = RunConfig(run_dir=str(tmp_path / "run"))
    config.model.student, config.model.teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    config.prompts.apply_chat_template = False
    config.prompts.max_prompt_tokens = 8
    config.rollouts.max_response_tokens = 24
    config.scores.topk = 64  # of 97: a random model is nearly flat
    for section in (config.rollouts, config.scores):
        section.engine = EngineConfig(max_model_len=64, max_num_seqs=32, max_num_batched_tokens=512)
        section.engine.kv_cache_memory_bytes = 64 << 20
    (tmp_path / "recipe.py").write_text(RECIPE.format(text=config.model_dump_json()))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(4, 64)))
    command = (sys.executable, "-m", "lopd_megatron.evaluation.measure", "--samples", "2")
    options = ("--recipe", f"{tmp_path}/recipe.py:run", "--input", str(prompts))
    done = subprocess.run((*command, *options), cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]

    found = json.loads((tmp_path / "run" / "measure" / "before.json").read_text())
    work = next(path for path in (tmp_path / "run" / "measure").iterdir() if path.is_dir())
    rows = shard_files.read_table(work / "scores", 0, SCORE_SCHEMA).to_pylist()
    assert found["responses"] == len(rows) == 120
    whole, tokens = 0.0, 0
    for row in rows:
        ids = row["prompt_tokens"] + row["response_tokens"]
        part = slice(len(row["prompt_tokens"]) - 1, len(ids) - 1)
        p, q = (reference(models[name], ids)[part].astype(np.float64) for name in ("student", "teacher"))
        whole, tokens = whole + float((np.exp(p) * (p - q)).sum()), tokens + len(p)
    classes = found["class_kl"]
    exact = whole / tokens
    for name in ("sampled_kl", "kl_estimate"):
        assert abs(found[name]["value"] - exact) < 4 * found[name]["standard_error"]
    assert 0.7 * exact < classes["value"] < exact
    ended = np.mean([row["finish_reason"] == "stop" for row in rows])
    assert found["stopped"]["value"] == pytest.approx(ended)
