"""The GPU session: its runner, and the code of its parts in small shapes on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo

from lopd_megatron.errors import UserError
from lopd_megatron.loss import fused_head
from lopd_megatron.parallel import topology as grid
from lopd_megatron.train import precision_aware_adam

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    return importlib.import_module


def run(tool: Any, monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--output", str(output), *arguments])
    tool("bench_gpu").main()
    return json.loads(output.read_text())


def program(code: str, limit_s: float = 30.0) -> Any:
    return importlib.import_module("bench_gpu").Part(["-c", code], limit_s)


DEVICE = 'import json; print(json.dumps({"tflops": 1, "machine": {"device": "FakeDevice"}}))'


@pytest.mark.processes
def test_a_failed_part_stops_nothing(tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = tool("bench_gpu")
    monkeypatch.setattr(bench, "LEAST_S", 0.5)
    parts = {
        "device": program(DEVICE),
        "fails": program("print('so far'); raise ValueError('broken')"),
        "cannot": program("import sys; print('error: needs a larger GPU'); sys.exit(2)"),
        "hangs": program("import time; print('began', flush=True); time.sleep(60)", limit_s=2.0),
        "tests": program(
            "print('SKIPPED [2] x.py: needs 2 GPUs'); print('=== 3 passed, 2 skipped in 1s ===')"
        ),
        "works": program("print('noise'); print('{\"ms\": 2.5}')"),
    }
    monkeypatch.setattr(bench, "PARTS", parts)
    report = run(tool, monkeypatch, tmp_path / "gpu.json")
    assert report["machine"] == {"device": "FakeDevice"}
    found = report["parts"]
    assert [found[name]["status"] for name in parts] == [
        "done",
        "failed",
        "skipped",
        "timeout",
        "done",
        "done",
    ]
    assert found["device"]["result"] == {"tflops": 1}
    assert found["fails"]["reason"] == "exit code 1: ValueError: broken"
    assert "so far" in found["fails"]["log"]
    assert found["cannot"]["reason"] == "needs a larger GPU"
    assert "began" in found["hangs"]["log"]
    assert found["tests"]["result"]["summary"] == "3 passed, 2 skipped in 1s"
    assert found["tests"]["result"]["skipped"] == ["SKIPPED [2] x.py: needs 2 GPUs"]
    assert found["works"]["result"] == {"ms": 2.5}
    assert {outcome["device"] for outcome in found.values()} == {"FakeDevice"}


@pytest.mark.processes
def test_a_second_call_goes_on_where_the_first_stopped(
    tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = tool("bench_gpu")
    monkeypatch.setattr(bench, "LEAST_S", 0.5)
    flag = tmp_path / "second"
    once = f"import pathlib; assert pathlib.Path({str(flag)!r}).exists(); print('{{}}')"
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); print('{{}}')"
    parts = {"device": program(DEVICE), "counted": program(count), "later": program(once)}
    monkeypatch.setattr(bench, "PARTS", parts)
    first = run(tool, monkeypatch, tmp_path / "gpu.json")
    assert first["parts"]["later"]["status"] == "failed"
    flag.touch()
    second = run(tool, monkeypatch, tmp_path / "gpu.json")
    assert second["parts"]["later"]["status"] == "done"
    run(tool, monkeypatch, tmp_path / "gpu.json", "--total-s", "0")
    assert (tmp_path / "count").read_text() == "x"


def test_no_part_begins_after_the_time_is_over(
    tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool("bench_gpu"), "PARTS", {"device": program(DEVICE)})
    report = run(tool, monkeypatch, tmp_path / "gpu.json", "--total-s", "5")
    assert report["parts"]["device"]["status"] == "skipped"
    assert "left of the total" in report["parts"]["device"]["reason"]


def test_the_limits_of_the_parts_leave_the_first_ones_their_time(tool: Any) -> None:
    """What issue and goals ask for fits the total even if each of these parts runs into its limit."""
    parts = tool("bench_gpu").PARTS
    needed = ("device", "head", "slice_8b", "full_8b", "tests")
    assert tuple(parts)[: len(needed)] == needed
    assert sum(parts[name].limit_s for name in needed) <= 720


@pytest.mark.parametrize("tokens", [512, 8192, 16_384])
def test_documents_fill_the_row(tool: Any, tokens: int) -> None:
    lengths = tool("bench_train_cases").row_lengths(tokens)
    assert sum(lengths) == tokens
    assert min(lengths) >= 2
    assert max(lengths) <= max(4396 + 400, 2 * tokens // 3)


def test_a_random_row_is_label_aligned(tool: Any) -> None:
    batch = tool("bench_train_cases").random_microbatch(np.array([40, 24]), 1000)
    assert torch.equal(batch.labels[0, :39], batch.tokens[0, 1:40])
    assert batch.loss_mask[0, [39, 63]].tolist() == [0, 0]
    assert batch.response_lengths.tolist() == [
        int(batch.loss_mask[0, :40].sum()),
        int(batch.loss_mask[0, 40:].sum()),
    ]
    assert batch.cu_seqlens.tolist() == [0, 40, 64]
    assert batch.max_seqlen == 40
    assert (batch.teacher_logprobs <= 0).all()


def test_what_cannot_fit_is_refused_before_the_model_is_built(tool: Any, tmp_path: Path) -> None:
    """By the memory model: the whole 8B student needs more than 80 GB, its eight-layer slice does not."""
    cases = tool("bench_train_cases")
    big, small = (cases.case_config(cases.CASES[name], tmp_path) for name in ("full_8b", "tiny"))
    (tmp_path / "config.json").write_text(json.dumps(cases.CASES["full_8b"].student))
    with pytest.raises(UserError, match="this device has 80 GiB"):
        cases.refuse_what_cannot_fit(big, 80 * 2**30)
    predicted = cases.refuse_what_cannot_fit(big, 139 * 2**30)
    assert 95 < predicted / 2**30 < 110
    (tmp_path / "config.json").write_text(json.dumps(cases.TINY))
    assert cases.refuse_what_cannot_fit(small, 2**40) < 2**30


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """What the test makes of process groups ends with it."""
    yield
    grid.destroy()
    torch.distributed.destroy_process_group()


@pytest.mark.processes
@pytest.mark.usefixtures("world_of_one")
def test_the_head_of_a_gpu_in_small(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure_cuda` on a CPU, where nothing is timed: its variants, precision and keys."""
    loss, shape = tool("bench_loss"), tool("bench_loss_step").Shape(64, 32, 512, 16)
    stock = loss.Head.__init__

    def in_bfloat16(self: Any, shape: Any) -> None:
        stock(self, shape)
        self.hidden = self.hidden.detach().bfloat16().requires_grad_()
        self.weight = self.weight.detach().bfloat16().requires_grad_()
        self.variants["megatron, fused"] = lambda: self.megatron(self.full, fused=True)

    def run_once(run: Any, repeats: int, *, reset: Any) -> tuple[float, float]:
        reset()
        run()
        return 1.0, 1.0

    monkeypatch.setattr(loss.Head, "__init__", in_bfloat16)
    monkeypatch.setattr(loss, "cuda_ms_gb", run_once)
    result = loss.measure_cuda(16, 1, shape)
    assert result["logprob_max_difference"] < 0.05
    assert result["dx_cosine"] > 0.999
    assert result["grad_rel_error"] < 0.03
    assert {"head_ms ours", "head_ms ours_quarter", "head_ms chunk 32", "products_alone_ms"} <= result.keys()


@torch._dynamo.config.patch(disable=False)  # an engine of another test in this process turns it off
def test_compiled_functions_are_the_eager_ones() -> None:
    """What torch.compile makes of them before any kernel is written: one graph, the same writes in place."""
    torch._dynamo.reset()

    def compiled(function: Any) -> Any:
        return torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 300, generator=generator)
    logits[:, 290:] = -torch.inf
    logits[3] = -torch.inf  # a shard of padding alone
    buffers = [logits.clone(), logits.clone()]
    sums = [
        function(buffer)
        for function, buffer in zip(
            (fused_head._exponentiate_rows_, compiled(fused_head._exponentiate_rows_)), buffers, strict=True
        )
    ]
    torch.testing.assert_close(*sums)
    torch.testing.assert_close(*buffers)
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16)
    eager = [torch.rand(100, generator=generator).to(dtype) for dtype in dtypes]
    other = [tensor.clone() for tensor in eager]
    settings = {"scalars": torch.tensor([0.999, 1e-2, 1.5]), "betas": (0.9, 0.98), "eps": 1e-8}
    precision_aware_adam.adamw_(*eager, **settings)
    compiled(precision_aware_adam.adamw_)(*other, **settings)
    for one, two in zip(eager, other, strict=True):
        assert torch.equal(one, two)
