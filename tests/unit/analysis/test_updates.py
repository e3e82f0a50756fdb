"""The streaming analysis of folders, its report and the models it writes, on a tiny series of checkpoints."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lopd_megatron.analysis.injection import keep_components, layer_window, spectral_part, write_model
from lopd_megatron.analysis.modules import Module, module_of
from lopd_megatron.analysis.output import write_report
from lopd_megatron.analysis.summary import summarize
from lopd_megatron.analysis.updates import Settings, analyze, rounding_norm
from lopd_megatron.errors import UserError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "analyze_updates.py"
LAYERS, HIDDEN, FFN = 3, 24, 40


def base_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "model.embed_tokens.weight": random(50, HIDDEN),
        "model.norm.weight": random(HIDDEN),
        "lm_head.weight": random(50, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "self_attn.q_norm.weight": random(8),
            prefix + "mlp.down_proj.weight": random(HIDDEN, FFN),
            prefix + "post_attention_layernorm.weight": random(HIDDEN),
        }
    return tensors


def direction(name: str, tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    if tensor.dim() == 1:
        return torch.randn(tensor.shape, generator=generator)
    rank3 = [torch.randn(size, 3, generator=generator) for size in tensor.shape]
    return rank3[0] @ rank3[1].T


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base and three checkpoints that move along one rank-3 direction, with fresh noise that fades."""
    generator = torch.Generator().manual_seed(7)
    written = []
    for step, (way, noise) in enumerate(((0.0, 0.0), (0.01, 0.1), (0.02, 0.02), (0.03, 0.003))):
        tensors = {
            name: tensor
            + way * direction(name, tensor)
            + noise * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base_tensors().items()
        }
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"step": step}))
        written.append(folder)
    return written


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.q_proj.weight", Module("attention", "q_proj", 12)),
        ("model.layers.3.mlp.experts.7.up_proj.weight", Module("mlp", "up_proj", 3)),
        ("model.layers.3.mlp.gate.weight", Module("mlp", "gate", 3)),
        ("model.layers.0.self_attn.k_norm.weight", Module("norm", "k_norm", 0)),
        ("model.layers.0.post_attention_layernorm.weight", Module("norm", "post_attention_layernorm", 0)),
        ("model.embed_tokens.weight", Module("embedding", "embed_tokens", None)),
        ("lm_head.weight", Module("output", "lm_head", None)),
    ],
)
def test_modules_by_name(name: str, expected: Module) -> None:
    assert module_of(name) == expected


def test_rows_equal_dense_numpy(folders: list[Path], tmp_path: Path) -> None:
    rows = analyze(folders[0], folders[1:], tmp_path / "out", Settings(top=3))
    assert len(rows) == 3 * len(base_tensors())
    name = "model.layers.1.mlp.down_proj.weight"
    old, *new = (load_file(folder / "model.safetensors")[name].double().numpy() for folder in folders)
    right = [np.linalg.svd(weights - old)[2][:3].T for weights in new]
    for row, weights, basis in zip([r for r in rows if r["tensor"] == name], new, right, strict=True):
        values = np.linalg.svd(weights - old, compute_uv=False)
        p = values / values.sum()
        # ΔW is a float32 difference, so it is good to 1e-7 of W, 1e-5 of itself.
        assert row["spectral_norm"] == pytest.approx(values[0], rel=1e-4)
        assert row["frobenius"] == pytest.approx(np.linalg.norm(values), rel=1e-4)
        assert row["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
        assert row["subspace_alignment"] == pytest.approx(
            np.linalg.norm(basis.T @ right[-1]) ** 2 / 3, rel=1e-3
        )
        assert (row["group"], row["module"], row["layer"]) == ("mlp", "down_proj", 1)
    assert [r["subspace_alignment"] for r in rows if r["tensor"] == name][-1] == pytest.approx(1)


def test_only_attention_and_mlp_matrices_are_decomposed(folders: list[Path], tmp_path: Path) -> None:
    rows = analyze(folders[0], folders[3:], tmp_path / "out", Settings())
    decomposed = {row["tensor"] for row in rows if "spectral_norm" in row}
    assert decomposed == {name for name in base_tensors() if "_proj" in name}


def test_shares_are_of_squared_norms_and_add_to_one(folders: list[Path], tmp_path: Path) -> None:
    rows = analyze(folders[0], folders[1:], tmp_path / "out", Settings())
    summary = summarize(rows)["step3"]
    assert sum(summary["group_share"].values()) == pytest.approx(1)
    assert sum(summary["module_share"].values()) == pytest.approx(1)
    old, new = (load_file(folders[i] / "model.safetensors") for i in (0, 3))
    squares = {name: float((new[name] - old[name]).double().square().sum()) for name in old}
    mlp = sum(value for name, value in squares.items() if ".mlp." in name)
    assert summary["group_share"]["mlp"] == pytest.approx(mlp / sum(squares.values()), rel=1e-5)
    # The noise fades, so the leading subspace comes nearer to the last one.
    alignment = [entry["mean_all"]["subspace_alignment"] for entry in summarize(rows).values()]
    assert alignment == sorted(alignment)


def test_a_killed_analysis_goes_on_where_it_was(folders: list[Path], tmp_path: Path) -> None:
    whole = analyze(folders[0], folders[1:], tmp_path / "whole", Settings())
    journal = tmp_path / "part" / "tensors.jsonl"
    journal.parent.mkdir()
    lines = (tmp_path / "whole" / "tensors.jsonl").read_text().splitlines(keepends=True)
    marked = lines[1].replace('"frobenius": ', '"frobenius": 1')  # shows that the line was not made again
    journal.write_text(lines[0] + marked + lines[2][:40])
    resumed = analyze(folders[0], folders[1:], tmp_path / "part", Settings())
    assert resumed[3:] == whole[3:]
    assert resumed[0]["frobenius"] != whole[0]["frobenius"]
    assert journal.read_text().splitlines()[2:] == [line.strip() for line in lines[2:]]
    other = analyze(
        folders[0], folders[1:], tmp_path / "part", Settings(top=2)
    )  # other settings: from the start
    assert other[0]["frobenius"] == whole[0]["frobenius"]


def test_checkpoints_of_two_models_are_refused(folders: list[Path], tmp_path: Path) -> None:
    tensors = base_tensors()
    del tensors["model.norm.weight"]
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UserError, match=r"first 'model\.norm\.weight'"):
        analyze(folders[0], [other], tmp_path / "out", Settings())
    save_file(base_tensors() | {"model.norm.weight": torch.ones(3)}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is \(3,\)"):
        analyze(folders[0], [other], tmp_path / "out", Settings())
    with pytest.raises(UserError, match="given twice"):
        analyze(folders[0], [folders[1], folders[1]], tmp_path / "out", Settings())


def test_rounding_norm_predicts_what_bfloat16_takes() -> None:
    weights = torch.randn(400, 400, generator=torch.Generator().manual_seed(0)) * 0.05
    stored = weights.bfloat16()
    lost = float((stored.float() - weights).norm())
    # One ulp/√12 is the deviation of an even spread between two neighbours; 160,000 elements.
    assert rounding_norm(stored) == pytest.approx(lost, rel=0.02)
    assert rounding_norm(weights) == 0.0


def test_bfloat16_inflates_the_effective_rank(tmp_path: Path) -> None:
    """Why the tool warns: a rank-2 update, small beside the weights, saved in bfloat16."""
    name, shape = "model.layers.0.mlp.up_proj.weight", (64, 64)
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(shape, generator=generator).bfloat16().float()
    update = 1e-3 * torch.randn(64, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    for folder, tensor in (("base", old), ("f32", old + update), ("bf16", (old + update).bfloat16())):
        (tmp_path / folder).mkdir()
        save_file({name: tensor}, tmp_path / folder / "model.safetensors")
    rows = analyze(tmp_path / "base", [tmp_path / "bf16", tmp_path / "f32"], tmp_path / "out", Settings())
    rank = {row["checkpoint"]: row["effective_rank"] for row in rows}
    assert rank["f32"] < 2.1
    assert rank["bf16"] > 20
    assert {row["checkpoint"]: row["rounding_share"] > 0.5 for row in rows} == {"f32": False, "bf16": True}


def test_report_files(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = analyze(folders[0], folders[1:], out, Settings())
    written = write_report(out, rows, summarize(rows))
    assert {path.name for path in written} == {
        "tensors.csv",
        "summary.json",
        "by_layer.png",
        "shares.png",
        "alignment.png",
    }
    for path in written:
        assert path.stat().st_size > 100
        if path.suffix == ".png":
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with (out / "tensors.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert len(table) == len(rows)
    assert table[0]["shape"] == "50x24"
    assert json.loads((out / "summary.json").read_text())["step3"]["matrices"] == 2 * LAYERS


def test_an_unchanged_checkpoint_has_no_spectrum_and_still_a_report(
    folders: list[Path], tmp_path: Path
) -> None:
    rows = analyze(folders[0], [folders[0]], tmp_path / "out", Settings())
    assert all(row["unchanged_share"] == 1.0 and "spectral_norm" not in row for row in rows)
    write_report(tmp_path / "out", rows, summarize(rows))


def test_a_layer_window_takes_tensors_and_rounds_nothing(folders: list[Path], tmp_path: Path) -> None:
    write_model(folders[0], folders[3], tmp_path / "model", layer_window(1, 2, "mlp"))
    old, new, made = (
        load_file(folder / "model.safetensors") for folder in (folders[0], folders[3], tmp_path / "model")
    )
    changed = {name for name in made if not torch.equal(made[name], old[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    assert all(torch.equal(made[name], new[name]) for name in changed)
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {"step": 3}
    with pytest.raises(UserError, match="exists"):
        write_model(folders[0], folders[3], tmp_path / "model", layer_window(0, 0, "both"))


def test_truncation_keeps_the_norm_at_the_top_and_not_at_the_bottom() -> None:
    delta = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    top = spectral_part(delta, "top", 0.5)
    assert torch.linalg.matrix_rank(top) == 2
    assert float(top.norm()) == pytest.approx(30**0.5)
    torch.testing.assert_close(top / top[0, 0], torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0])).double() / 4)
    torch.testing.assert_close(
        spectral_part(delta, "bottom", 0.5), torch.diag(torch.tensor([0.0, 0.0, 2.0, 1.0])).double()
    )
    torch.testing.assert_close(spectral_part(delta, "top", 1.0), delta)
    low_rank = torch.ones(6, 5, dtype=torch.float64)  # r = 1: the bottom half of one component is none
    assert not spectral_part(low_rank, "bottom", 0.5).abs().max() > 1e-12


def test_truncated_models_keep_other_tensors_as_trained(folders: list[Path], tmp_path: Path) -> None:
    write_model(folders[0], folders[3], tmp_path / "model", keep_components("top", 0.05))
    old, new, made = (
        load_file(folder / "model.safetensors") for folder in (folders[0], folders[3], tmp_path / "model")
    )
    for name in made:
        if "_proj" in name:
            assert torch.linalg.matrix_rank((made[name] - old[name]).double(), rtol=1e-3) == 2  # ⌈24·0.05⌉
        else:
            assert torch.equal(made[name], new[name])


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.processes
def test_tool_analyzes(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    series = [part for folder in folders[1:] for part in ("--checkpoint", folder)]
    done = run_tool("--base", folders[0], *series, "--output", out)
    assert done.returncode == 0, done.stderr
    assert "step3: 6 matrices" in done.stdout
    assert (out / "alignment.png").is_file()


def test_tool_refuses_and_shows_what_it_would_do(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(TOOL), "--base", folders[0], "--checkpoint", folders[1], "--output", out]
    for options, code, text in (
        (["--dry-run"], 0, f"would write: {out}"),
        (["--window", "5:2"], 2, "error: --window '5:2' is not FIRST:LAST with 0 ≤ FIRST ≤ LAST, as in 0:8"),
    ):
        monkeypatch.setattr(sys, "argv", [*map(str, command), *options])
        with pytest.raises(SystemExit) as leave:
            runpy.run_path(str(TOOL), run_name="__main__")
        assert leave.value.code == code
        assert text in "".join(capsys.readouterr())
        assert not out.exists()
