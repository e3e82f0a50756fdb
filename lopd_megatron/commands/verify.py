"""Proves that stored log-probs belong to their tokens: the generating model scores a sample of them again.

    lopd verify recipes/tiny.py:lightning_opd [--documents 64] [--scorer vllm]

Reads the run's datasets (data.prefixes, else the one it built) and the model that wrote the rollouts. Prints
mean and max |difference| in nats and where the worst is; exit code 2 beyond data.alignment_tolerance.
"""

from __future__ import annotations

import json

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.data.alignment import Sample, compare, refuse_misaligned, sample_indices
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.progress import log_line
from lopd_megatron.rollouts.share import generator_model


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--documents", type=int, help="how many; default: data.alignment_sample, 0: all")
    arguments.add_argument("--scorer", choices=("auto", "transformers", "vllm"), default="auto")
    config, options = parse(arguments)
    model = generator_model(config)
    if options.dry_run:
        return dry_run(config, [*config.dataset_prefixes, model], [])
    from lopd_megatron.rollouts.alignment_scorer import open_scorer

    dataset = open_dataset(config.dataset_prefixes)
    if "rollout_logprobs" not in dataset.columns:
        raise UserError(f"{config.dataset_prefixes[0]} has no rollout_logprobs, so there is nothing to prove")
    wanted = config.data.alignment_sample if options.documents is None else options.documents
    samples = []
    for index in sample_indices(len(dataset), wanted or len(dataset)):
        part, place = dataset.locate(index)
        samples.append(Sample.of(index, dataset.document(index), part.document_id(place)))
    with open_scorer(config, model, options.scorer) as scorer:
        report = compare(samples, scorer, config.data.alignment_tolerance)
    print(json.dumps(report.as_dict()))
    refuse_misaligned(report, config.dataset_prefixes[0])
    log_line(f"aligned: {report.line()}")
    return 0
