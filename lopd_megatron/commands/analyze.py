"""Spectra of weight updates between a base model and one or more checkpoints of it.

    lopd analyze --base HF --checkpoint HF [--checkpoint HF ...] --output DIR

writes DIR/tensors.csv, summary.json and plots. Give the checkpoints in the order of training; the last one is
what the others are aligned with. Export them in float32: bfloat16 rounds small updates away.

With --window FIRST:LAST or --keep top:0.1 it writes a model between base and checkpoint instead, to evaluate:
only these layers updated, or only this share of every update's singular components.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lopd_megatron.analysis.injection import Edit, keep_components, layer_window, write_model
from lopd_megatron.analysis.output import write_report
from lopd_megatron.analysis.summary import summarize
from lopd_megatron.analysis.updates import Settings, analyze, check_same_tensors
from lopd_megatron.errors import UserError
from lopd_megatron.hf_folder import HfFolder
from lopd_megatron.progress import log_line

ROUNDING_LIMIT = 0.1


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--base", type=Path, required=True, help="Hugging Face folder before training")
    result.add_argument(
        "--checkpoint", type=Path, action="append", required=True, help="folder after; repeat"
    )
    result.add_argument("--output", type=Path, required=True)
    result.add_argument("--top", type=int, default=Settings.top, help="K of the subspace alignment")
    result.add_argument(
        "--exact-limit",
        type=int,
        default=Settings.exact_limit,
        help="longest shorter side that is decomposed exactly",
    )
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--window", metavar="FIRST:LAST", help="write base with these layers updated")
    result.add_argument("--modules", choices=("attention", "mlp", "both"), default="both", help="in --window")
    result.add_argument(
        "--keep", metavar="PART:SHARE", help="write base with top:SHARE or bottom:SHARE of ΔW"
    )
    result.add_argument("--dry-run", action="store_true", help="say what would be read and written")
    return result


def chosen_edit(arguments: argparse.Namespace) -> Edit | None:
    """What --window or --keep ask for; None for an analysis."""
    if arguments.window and arguments.keep:
        raise UserError("--window and --keep are two experiments; give one")
    if (arguments.window or arguments.keep) and len(arguments.checkpoint) > 1:
        raise UserError(f"--window and --keep take one --checkpoint (given {len(arguments.checkpoint)})")
    if arguments.window:
        first, _, last = arguments.window.partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise UserError(
                f"--window {arguments.window!r} is not FIRST:LAST with 0 ≤ FIRST ≤ LAST, as in 0:8"
            )
        return layer_window(int(first), int(last), arguments.modules)
    if arguments.keep:
        part, _, share = arguments.keep.partition(":")
        try:
            number = float(share)
        except ValueError:
            number = -1.0
        if part not in ("top", "bottom") or not 0 < number <= 1:
            raise UserError(f"--keep {arguments.keep!r} is not top:SHARE or bottom:SHARE with 0 < SHARE ≤ 1")
        return keep_components(part, number)
    return None


def main() -> int:
    arguments = parser().parse_args()
    edit = chosen_edit(arguments)
    base, checkpoints, output = arguments.base, arguments.checkpoint, arguments.output
    if arguments.dry_run:
        for folder in checkpoints:
            check_same_tensors(HfFolder(base), HfFolder(folder))
        for path in (base, *checkpoints):
            print(f"would read:  {path}")
        print(f"would write: {output}")
        return 0
    if edit is not None:
        write_model(base, checkpoints[0], output, edit)
        print(f"wrote {output}")
        return 0
    settings = Settings(top=arguments.top, exact_limit=arguments.exact_limit)
    rows = analyze(base, checkpoints, output, settings, arguments.device)
    summary = summarize(rows)
    for label, entry in summary.items():
        if entry["rounding_share"] > ROUNDING_LIMIT:
            log_line(
                f"warning: {label} is stored in 16 bits and rounding makes {entry['rounding_share']:.0%} of "
                "its ΔW, so effective ranks are too large; export it in float32"
            )
        means = ", ".join(f"{name} {value:.4g}" for name, value in entry["mean_all"].items())
        print(f"{label}: {entry['matrices']} matrices, {means}")
    for path in write_report(output, rows, summary):
        print(f"wrote {path}")
    return 0
