"""Raw data sets → prompt shards: chat template applied, tokenized once, filtered, deduplicated, split.

    python tools/prepare_prompts.py --recipe recipes/tiny.py:sft

Reads `prompts.input`, the tokenizer of `model.student`; writes `<run_dir>/prompts/shard-*.parquet`.
"""

from __future__ import annotations

from lopd_megatron.cli import dry_run, parse, parser
from lopd_megatron.errors import UserError, run_program
from lopd_megatron.inference import prompts
from lopd_megatron.progress import say


def main() -> int:
    config, options = parse(parser(__doc__))
    section, folder = config.prompts, config.paths.prompts
    if options.dry_run:
        return dry_run(config, [*section.input, config.model.student], [folder])
    tokenizer = prompts.load_tokenizer(config.model.student, trust_remote_code=config.model.trust_remote_code)
    template = prompts.Template(tokenizer, section.apply_chat_template, section.enable_thinking)
    rows, counts = prompts.collect(section, template)
    if not rows:
        raise UserError(f"no prompt is left of {counts['read']}: {dict(counts)}; look at prompts.*")
    lineage = {"prompts": section.model_dump(mode="json", exclude={"input"})}
    prompts.write_prompts(folder, rows, section.num_shards, lineage)
    say(f"{folder}: {len(rows)} prompts; " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    return 0


if __name__ == "__main__":
    run_program(main)
