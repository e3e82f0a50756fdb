"""Scored rollouts (OPD) or rollouts (SFT) → the indexed dataset for training.

    lopd dataset recipes/tiny.py:lightning_opd
    lopd dataset recipes/qwen3_8b.py:lightning_opd --from-official DATA.parquet …

Reads `<run_dir>/scores` (with loss.objective=sft: `<run_dir>/rollouts`), writes `<run_dir>/dataset/train.*`
and `<run_dir>/dataset/valid.*`, the prompts that are held out (data.valid_fraction).
Rollouts that are left out are counted by reason. Before the dataset is finished, the generating model scores
`data.alignment_sample` documents again and must find the stored log-probs. Start it again after a kill: it
goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.config import RunConfig
from lopd_megatron.data.build_dataset import build_dataset, build_from
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.held_out import HeldOut, valid_prefix
from lopd_megatron.data.manifest import Manifest
from lopd_megatron.data.official import OfficialFile, prompt_tokenizer
from lopd_megatron.data.shard_reader import read_shards
from lopd_megatron.data.stops import special_token_ids
from lopd_megatron.errors import UserError
from lopd_megatron.fingerprints import model_fingerprint, tokenizer_fingerprint
from lopd_megatron.hf_folder import vocab_size_of
from lopd_megatron.lineage import Lineage, check_consistency
from lopd_megatron.progress import log_line
from lopd_megatron.rollouts.share import generator_model


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--from-official", nargs="+", type=Path, metavar="PARQUET", help="files of the official release"
    )
    config, options = parse(arguments)
    paths, data = config.paths, config.data
    source = paths.scores if config.needs_teacher else paths.rollouts
    if options.dry_run:
        held_out_files = f"{valid_prefix(paths.dataset_prefix)}.*"
        return dry_run(
            config, options.from_official or [source], [f"{paths.dataset_prefix}.*", held_out_files]
        )
    held_out = HeldOut(data.valid_fraction, data.valid_seed)
    filters = Filters(data.seq_length, data.drop_truncated, data.drop_repeated)
    if options.from_official:
        manifest = import_official(config, options.from_official, filters, held_out)
    else:
        from lopd_megatron.rollouts.alignment_scorer import alignment_proof
        from lopd_megatron.rollouts.rollout_stage import stop_token_ids

        model = generator_model(config)
        manifest = build_dataset(
            source,
            paths.dataset_prefix,
            filters=filters,
            held_out=held_out,
            special_ids=special_token_ids(model) | set(stop_token_ids(model)),
            proof=alignment_proof(config, model),
            proof_documents=data.alignment_sample,
            vocab_size=vocab_size_of(config.model.student) if config.model.student else None,
            allow_mismatch=checked(config, read_shards(source)[0].lineage, source),
        )
    report(config, manifest)
    return 0


def import_official(config: RunConfig, files: list[Path], filters: Filters, held_out: HeldOut) -> Manifest:
    """The files do not say who made them: the recipe does, and the lineage takes its word."""
    for file in files:
        if not file.is_file():
            raise UserError(f"--from-official {file} does not exist")
    student, teacher = config.model.student, config.model.teacher
    lineage = Lineage(
        generator=model_fingerprint(student),
        teacher=model_fingerprint(teacher) if teacher else None,
        tokenizer=tokenizer_fingerprint(student),
    )
    lineage.allow_mismatch = checked(config, lineage, files[0])
    vocab_size = vocab_size_of(student)
    sources = [OfficialFile(file, prompt_tokenizer(student), vocab_size) for file in files]
    return build_from(
        sources,
        config.paths.dataset_prefix,
        filters=filters,
        held_out=held_out,
        lineage=lineage,
        vocab_size=vocab_size,
    )


def checked(config: RunConfig, lineage: Lineage, origin: Path) -> str:
    return check_consistency(
        student=config.model.student or None,
        teacher=config.model.teacher or None,
        data=lineage,
        data_origin=origin,
        needs_teacher=config.needs_teacher,
        allow_mismatch=config.lineage.allow_mismatch,
    )


def report(config: RunConfig, manifest: Manifest) -> None:
    counts = {**manifest.dropped, **{f"{name} (kept)": n for name, n in manifest.flagged_kept.items()}}
    log_line(
        f"{config.paths.dataset_prefix}: {manifest.documents} documents, {manifest.tokens} tokens, "
        f"{manifest.trained_tokens} trained; left out: " + ", ".join(f"{k} {n}" for k, n in counts.items())
    )
    if manifest.alignment:
        log_line(f"aligned: mean |difference| {manifest.alignment['mean_abs_difference']:.2e} nats")
    else:
        log_line("alignment not proved: data.alignment_sample=0, or the files have no rollout log-probs")
