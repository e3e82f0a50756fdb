"""Scored rollouts (OPD) or rollouts (SFT) → the indexed dataset for training.

    python tools/build_dataset.py --recipe recipes/tiny.py:lightning_opd

Reads `<run_dir>/scored` (with loss.objective=sft: `<run_dir>/rollouts`), writes `<run_dir>/dataset/train.*`.
Rollouts that are left out are counted by reason. Start it again after a kill: it goes on where it was.
"""

from __future__ import annotations

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.config import RunConfig
from lopd_megatron.data.build import build_dataset
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.manifest import Manifest
from lopd_megatron.errors import run_program
from lopd_megatron.progress import say


def main() -> int:
    config, options = parse(parser(__doc__))
    paths = config.paths
    source = paths.rollouts if config.loss.objective == "sft" else paths.scored
    if options.dry_run:
        return dry_run(config, [source], [f"{paths.dataset_prefix}.*"])
    manifest = build_dataset(source, paths.dataset_prefix, filters=filters(config))
    report(config, manifest)
    return 0


def filters(config: RunConfig) -> Filters:
    data = config.data
    return Filters(data.seq_length, data.drop_truncated, data.drop_repeated)


def report(config: RunConfig, manifest: Manifest) -> None:
    counts = {**manifest.dropped, **{f"{name} (kept)": n for name, n in manifest.kept.items()}}
    say(
        f"{config.paths.dataset_prefix}: {manifest.documents} documents, {manifest.tokens} tokens, "
        f"{manifest.trained_tokens} trained; left out: " + ", ".join(f"{k} {n}" for k, n in counts.items())
    )


if __name__ == "__main__":
    run_program(main)
