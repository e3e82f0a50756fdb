"""Writes the newest checkpoint of a run as a Hugging Face folder; `lopd convert export` takes any folders.

    lopd export recipes/tiny.py:lightning_opd [--precision bf16|fp32] [section.key=value ...]

Reads `<run_dir>/checkpoints`, writes `<run_dir>/hf`. A second export of the same checkpoint writes nothing.
"""

from __future__ import annotations

from lopd_megatron import cli


def main() -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("--precision", choices=("bf16", "fp32"), help="default: as stored")
    config, options = cli.parse(arguments)
    folders = {"checkpoint": config.paths.checkpoints, "hf": config.model.student, "output": config.paths.hf}
    if options.dry_run:
        return cli.dry_run(config, [folders["checkpoint"], folders["hf"]], [folders["output"]])
    from lopd_megatron.commands import convert

    words = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    precision = ["--precision", options.precision] if options.precision else []
    return convert.main(["export", *words, *precision, "--overwrite"])
