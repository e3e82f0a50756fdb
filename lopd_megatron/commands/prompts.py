"""Raw data sets → prompt shards: chat template applied, tokenized once, filtered, deduplicated, split.

    lopd prompts recipes/tiny.py:sft

Reads `prompts.input`, the tokenizer of `model.student`; writes `<run_dir>/prompts`: shards, and `counts.json`
with what was dropped and why.
"""

from __future__ import annotations

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.rollouts.prompts import run_prompts


def main() -> int:
    config, options = parse(parser(__doc__))
    if options.dry_run:
        return dry_run(config, [*config.prompts.input, config.model.student], [config.paths.prompts])
    return run_prompts(config)
