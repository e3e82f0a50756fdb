"""Downloads a data set of the paper from the Hugging Face hub, where the recipes look for it.

lopd data dapo_math [--output FILE.jsonl]
lopd data --list
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lopd_megatron.errors import UserError
from lopd_megatron.progress import log_line
from lopd_megatron.rollouts.downloads import DATA, write_data


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("name", nargs="?", choices=list(DATA))
    arguments.add_argument("--output", type=Path, metavar="FILE", help="default: where the recipes look")
    arguments.add_argument("--list", action="store_true", help="print names, sources and licences")
    arguments.add_argument("--dry-run", action="store_true", help="say what would be read and written")
    args = arguments.parse_args()
    if args.list:
        for name, data in DATA.items():
            print(f"{name:<16}{data.repository} ({data.split}), licence {data.licence} → {data.output}")
        return 0
    if args.name is None:
        raise UserError(f"name a data set: {', '.join(DATA)}")
    data = DATA[args.name]
    output = args.output or Path(data.output)
    if args.dry_run:
        print(f"would read:  {data.repository} ({data.split})\nwould write: {output}")
        return 0
    if output.exists():
        log_line(f"{output} is already there; delete it to download it again")
        return 0
    write_data(args.name, output)
    return 0
