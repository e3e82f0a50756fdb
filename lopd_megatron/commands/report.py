"""A run folder as one HTML page: lineage, data, curves, rollouts by token, evaluation, cost, warnings.

    lopd report runs/demo/lightning_opd [--output report.html]

The page needs no network and no scripts. Stages that have not run yet are named as missing, so a report can
be made at any time. Responses after training are shown where `lopd measure` has sampled them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lopd_megatron.files import atomic_path
from lopd_megatron.progress import log_line
from lopd_megatron.report.page import render
from lopd_megatron.report.run_folder import read_run


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("run", type=Path, help="the run_dir of a run")
    arguments.add_argument("--output", type=Path, help="default: report.html in the run folder")
    arguments.add_argument(
        "--documents", type=int, default=4, help="rollouts shown before and after training"
    )
    arguments.add_argument("--dry-run", action="store_true", help="say what would be read and written")
    args = arguments.parse_args()
    output = args.output or args.run / "report.html"
    if args.dry_run:
        print(f"would read:  {args.run}\nwould write: {output}")
        return 0
    page = render(read_run(args.run), documents=args.documents)
    with atomic_path(output) as temporary:
        temporary.write_text(page)
    log_line(f"wrote {output} ({len(page) / 1e6:.1f} MB)")
    return 0
