"""Prints what a dataset holds and where it came from, shows documents, checks hashes, draws histograms.

    lopd inspect runs/demo/lightning_opd/dataset/train
    lopd inspect PREFIX --verify --plots plots
    lopd inspect PREFIX --documents 0,17 --tokenizer runs/demo/sft/hf

Shown tokens are coloured by teacher − rollout log-prob: red where the teacher finds them less likely.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lopd_megatron.data.inspection import Decode, document_lines, row_advice, save_histograms, summary
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.progress import log_line


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("prefix", nargs="+")
    arguments.add_argument("--verify", action="store_true", help="hash every byte, check every value")
    arguments.add_argument("--documents", default="", metavar="I,J", help="show these documents")
    arguments.add_argument("--tokenizer", type=Path, help="Hugging Face folder, to show text instead of ids")
    arguments.add_argument("--plots", type=Path, metavar="FOLDER", help="lengths.png and logprob_gap.png")
    arguments.add_argument("--dry-run", action="store_true", help="say what would be read and written")
    args = arguments.parse_args()
    if args.dry_run:
        print(*(f"would read:  {prefix}.*" for prefix in args.prefix), sep="\n")
        print(*([f"would write: {args.plots}/*.png"] if args.plots else []), sep="\n")
        return 0
    dataset = open_dataset(args.prefix)
    for prefix, manifest in zip(args.prefix, dataset.manifests, strict=True):
        print(*summary(prefix, manifest), sep="\n")
    print(*row_advice(dataset.lengths), sep="\n")
    if args.verify:
        dataset.verify()
        log_line(f"verified: {len(dataset)} documents, every hash and every value")
    decode = decoder(args.tokenizer) if args.tokenizer else None
    for index in indices(args.documents, len(dataset)):
        print(*document_lines(dataset, index, decode, sys.stdout.isatty()), sep="\n")
    if args.plots:
        log_line("wrote " + ", ".join(str(path) for path in save_histograms(dataset, args.plots)))
    return 0


def indices(text: str, size: int) -> list[int]:
    found = []
    for word in filter(None, text.split(",")):
        if not word.strip().isdigit() or int(word) >= size:
            raise UserError(f"--documents {word!r}: write indices from 0 to {size - 1}, as in 0,17")
        found.append(int(word))
    return found


def decoder(folder: Path) -> Decode:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda token: tokenizer.decode([token])
