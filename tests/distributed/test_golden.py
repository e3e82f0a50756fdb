"""Golden losses: a refactoring leaves every bit of them as it is.

    python -m tests.distributed.test_golden      writes them anew, for a change that is meant to move them

The last bits of a float32 product depend on the processor and on torch, so the file says which ones it is
from; on others the losses must agree to rounding.
"""

from __future__ import annotations

import json
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.tiny_run import advance, layout, tiny_config, tiny_trainer, write_inputs
from tests.distributed.world import run_world

pytestmark = pytest.mark.dist

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
STEPS = 4
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "sft": ("qwen3", 1, layout(loss__objective="sft")),
    "lightning_opd": ("qwen3", 1, layout(loss__advantage_clip=0.5)),
    "per sequence, plain head": ("qwen3", 1, layout(loss__normalization="per_sequence", loss__head="plain")),
    "opd_importance": ("qwen3", 1, layout(loss__objective="opd_importance")),
    "bf16": ("qwen3", 1, layout(train__precision="bf16")),
    "TP2 PP2": ("qwen3", 4, layout(tp=2, pp=2)),
    "mixture, EP2": ("qwen3_moe", 2, layout(ep=2)),
}


def losses(folder: str, settings: dict[str, Any]) -> list[list[str]]:
    """[loss, gradient norm] of each step in hexadecimal, which keeps every bit."""
    trainer = tiny_trainer(tiny_config(Path(folder), Path(folder) / "run", **settings))
    return [[float(value).hex() for value in step] for step in advance(trainer, STEPS)]


def measured(folder: Path) -> dict[str, list[list[str]]]:
    families = sorted({family for family, _, _ in CASES.values()})
    inputs = {family: write_inputs(folder / family, family) for family in families}
    return {
        name: run_world(losses, ranks, str(inputs[family]), settings)[0]
        for name, (family, ranks, settings) in CASES.items()
    }


def arithmetic() -> dict[str, str]:
    """What decides the last bits."""
    lines = re.findall(r"^(cpu family|model)\s*: (\w+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    model = ", ".join(f"{name} {number}" for name, number in dict(lines).items())
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": f"{platform.machine()}, {model}, {capability}", "torch": torch.__version__}


def test_losses_are_golden(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = measured(tmp_path)
    if golden["arithmetic"] == arithmetic():
        assert found == golden["losses"]
        return
    assert found.keys() == golden["losses"].keys()
    for name, steps in found.items():
        # Sums in another order, three steps of Adam later; bf16 keeps 8 bits.
        tolerance = 2e-2 if name == "bf16" else 2e-5
        assert numbers(steps) == pytest.approx(numbers(golden["losses"][name]), rel=tolerance), name


def numbers(steps: list[list[str]]) -> list[float]:
    return [float.fromhex(value) for step in steps for value in step]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        content = {"arithmetic": arithmetic(), "losses": measured(Path(temporary))}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
