"""Weights between Hugging Face folders and Megatron checkpoints, one tensor at a time, without a GPU.

    lopd convert import    --hf FOLDER --checkpoint NEW_FOLDER
    lopd convert export    --checkpoint FOLDER --hf SOURCE_FOLDER --output NEW_FOLDER
    lopd convert export    --recipe FILE.py:FUNCTION
    lopd convert roundtrip --hf FOLDER --work NEW_FOLDER
    lopd convert verify    --hf FOLDER [--checkpoint FOLDER]

import     writes the weights as a torch_dist checkpoint that loads under any layout
export     writes a checkpoint (iter_0000150/, or the folder above it for the newest) of any layout as
           safetensors; config, tokenizer, chat template, generation config and licence come from the folder
           training started from; a recipe names all three folders
roundtrip  imports, exports, compares bit for bit and removes what it wrote
verify     compares the logits of transformers and of Megatron on fixed tokens in float32; with
           --checkpoint the Megatron side is the checkpoint and --hf its export
Memory: the largest parameter and its parts (verify holds both models). Exit code 1: not the same.
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from lopd_megatron.cli import load_recipe
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import sha256_file
from lopd_megatron.hf_folder import HfFolder, read_json
from lopd_megatron.model.student_spec import StudentSpec, student_spec
from lopd_megatron.parallel import topology as grid
from lopd_megatron.progress import log_line

TOLERANCE = 1e-3
"""Largest accepted |logit difference| in float32: rounding grows with depth, a wrong weight shows as > 1."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    # Megatron-Core says in many places that optional packages are absent.
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    if args.dry_run:
        return show_plan(args)
    return {"import": import_hf, "export": export, "roundtrip": roundtrip, "verify": verify}[args.command](
        args
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = arguments.add_subparsers(dest="command", required=True)
    options = {
        "import": ("--hf", "--checkpoint"),
        "export": ("--checkpoint", "--hf", "--output"),
        "roundtrip": ("--hf", "--work"),
        "verify": ("--hf",),
    }
    for name, needed in options.items():
        command = commands.add_parser(name)
        for option in needed:
            command.add_argument(option, type=Path, required=name != "export", metavar="FOLDER")
        command.add_argument("--dry-run", action="store_true", help="print what would be read and written")
        if name != "verify":
            command.add_argument("--precision", choices=("bf16", "fp32"), help="default: as stored")
    commands.choices["export"].add_argument("--overwrite", action="store_true")
    commands.choices["export"].add_argument("--recipe", metavar="FILE.py:FUNCTION")
    commands.choices["verify"].add_argument("--checkpoint", type=Path, metavar="FOLDER")
    args = arguments.parse_args(argv)
    if args.command == "export":
        fill_from_recipe(args)
    return args


def fill_from_recipe(args: argparse.Namespace) -> None:
    """The folders of an export that were not given, from the recipe's run."""
    if args.recipe:
        config = load_recipe(args.recipe)
        args.checkpoint = args.checkpoint or config.paths.checkpoints
        args.hf = args.hf or Path(config.model.student)
        args.output = args.output or config.paths.hf
    for name in ("checkpoint", "hf", "output"):
        if getattr(args, name) is None:
            raise UserError(f"export needs --{name} FOLDER, or --recipe FILE.py:FUNCTION which names it")


def show_plan(args: argparse.Namespace) -> int:
    reads = {"import": ["hf"], "export": ["checkpoint", "hf"]}.get(args.command, ["hf", "checkpoint"])
    writes = {"import": "checkpoint", "export": "output", "roundtrip": "work"}.get(args.command)
    for name in reads:
        if getattr(args, name, None) and not (args.command == "roundtrip" and name == "checkpoint"):
            print(f"would read:  {getattr(args, name)}")
    if writes:
        print(f"would write: {getattr(args, writes)}")
    return 0


def import_hf(args: argparse.Namespace) -> int:
    from lopd_megatron.model.checkpoint_writer import write_checkpoint
    from lopd_megatron.model.weights import HfTensors

    spec, _ = one_process(args.hf, chosen_precision(args))
    write_checkpoint(HfTensors(args.hf, spec), spec, args.checkpoint)
    log_line(f"imported {args.hf} to {args.checkpoint}")
    return 0


def export(args: argparse.Namespace) -> int:
    from lopd_megatron.model.checkpoint_reader import CheckpointTensors, newest_checkpoint
    from lopd_megatron.model.export import check_output, export_problem, write_hf_folder

    folder = newest_checkpoint(args.checkpoint)
    made_of = describe_export(folder, args.hf, args.precision)
    if args.overwrite and args.output.is_dir():
        problem = export_problem(args.output, made_of)
        if not problem:
            log_line(f"{args.output} is already the export of {folder}")
            return 0
        log_line(f"{args.output} is exported again: {problem}")
    check_output(args.output, args.hf, overwrite=args.overwrite)
    spec, _ = one_process(args.hf, "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[args.precision]
    description = folder / "checkpoint.json"
    lineage = read_json(description).get("lineage") if description.is_file() else None
    write_hf_folder(
        CheckpointTensors(folder, spec),
        spec,
        args.output,
        args.hf,
        dtype=dtype,
        overwrite=args.overwrite,
        lineage=lineage,
        made_of=made_of,
    )
    log_line(f"exported {folder} to {args.output}")
    return 0


def describe_export(checkpoint: Path, hf: Path, precision: str | None) -> dict[str, object]:
    """What tells one export from another.

    The checkpoint's files by size and time, the model's config and companions by hash, and the precision.
    """
    from lopd_megatron.model.export import companions

    stats = {file.name: file.stat() for file in sorted(checkpoint.glob("*")) if file.is_file()}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    model = {
        name: sha256_file(hf / name) for name in [*companions(hf), "config.json"] if (hf / name).is_file()
    }
    return {"checkpoint": checkpoint.name, "files": files, "model": model, "precision": precision}


def roundtrip(args: argparse.Namespace) -> int:
    from lopd_megatron.model.checkpoint_reader import CheckpointTensors
    from lopd_megatron.model.checkpoint_writer import write_checkpoint
    from lopd_megatron.model.export import write_hf_folder
    from lopd_megatron.model.verify import differing_tensors
    from lopd_megatron.model.weights import HfTensors

    if args.work.exists():
        raise UserError(f"work folder {args.work} exists; remove it or choose another")
    spec, _ = one_process(args.hf, chosen_precision(args))
    args.work.mkdir(parents=True)
    try:
        write_checkpoint(HfTensors(args.hf, spec), spec, args.work / "checkpoint")
        source = CheckpointTensors(args.work / "checkpoint", spec)
        write_hf_folder(source, spec, args.work / "hf", args.hf)
        differing = differing_tensors(args.hf, args.work / "hf")
    finally:
        shutil.rmtree(args.work)
    return verdict(not differing, f"{len(differing)} tensors differ {differing[:3]}")


def verify(args: argparse.Namespace) -> int:
    from lopd_megatron.model.checkpoint_reader import CheckpointTensors, newest_checkpoint
    from lopd_megatron.model.export import WholeTensors
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.verify import fixed_documents, student_logits, transformers_logits
    from lopd_megatron.model.weights import HfTensors, load_tensors

    spec, topology = one_process(args.hf, "fp32")
    source: WholeTensors = HfTensors(args.hf, spec)
    if args.checkpoint:
        source = CheckpointTensors(newest_checkpoint(args.checkpoint), spec)
    chunks = build_student(spec, topology)
    load_tensors(chunks, source, spec, topology)
    documents = fixed_documents(spec.vocab_size)
    ours = student_logits(chunks, documents, topology)
    assert ours is not None
    theirs = transformers_logits(args.hf, documents)
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    scale = max(b.abs().max().item() for b in theirs)
    return verdict(
        difference <= TOLERANCE, f"max |logit difference| {difference:.2e} (largest logit {scale:.1f})"
    )


def verdict(same: bool, detail: str) -> int:
    print(f"{'SAME' if same else 'DIFFERENT'}: {detail}")
    return 0 if same else 1


def one_process(hf: Path, precision: str) -> tuple[StudentSpec, grid.Topology]:
    """The whole model as one rank, with torch.distributed started for it."""
    config = RunConfig()
    config.train.precision = precision  # type: ignore[assignment]
    config.model.attention = "sdpa"
    return student_spec(hf, config), grid.initialize(config.parallel, seed=1)


def stored_precision(hf: Path) -> str:
    """The precision that loses nothing of the files, whatever config.json says of them."""
    return "bf16" if HfFolder(hf).kinds() == {"BF16"} else "fp32"


def chosen_precision(args: argparse.Namespace) -> str:
    """The precision that was asked for, else that of the files; a loss is reported."""
    stored = stored_precision(args.hf)
    if args.precision == "bf16" and stored == "fp32":
        log_line(f"{args.hf} stores more than bfloat16 keeps: --precision bf16 rounds the weights")
    return args.precision or stored
