"""One rank of standard OPD; `tools/train_online.py` starts the servers and the ranks.

    torchrun --nproc-per-node N -m lopd_megatron.launch.train_online --recipe FILE.py:FUNCTION \\
        online.student_url=http://… online.teacher_url=http://… [section.key=value ...]

Reads `<run_dir>/prompts`. Exit codes are those of `lopd_megatron.train`.
"""

from __future__ import annotations

import hashlib
import sys

from lopd_megatron import cli
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.inference import shards
from lopd_megatron.inference.requests import Sampling
from lopd_megatron.inference.rollouts import stop_token_ids
from lopd_megatron.inference.student_client import ServerClient
from lopd_megatron.launch.effopd import effopd_hooks
from lopd_megatron.launch.online import Engines, OnlineRollouts, Prompt
from lopd_megatron.lineage import (
    Lineage,
    check_consistency,
    model_fingerprint,
    read_model_lineage,
    tokenizer_fingerprint,
)
from lopd_megatron.records import PROMPT_SCHEMA
from lopd_megatron.train.abort import run_rank
from lopd_megatron.train.inputs import Inputs
from lopd_megatron.train.launched import launch_rank


def main() -> int:
    config, options = cli.parse(cli.parser(__doc__))
    paths = config.paths
    if options.dry_run:
        reads = [config.model.student, config.model.teacher, paths.prompts]
        return cli.dry_run(config, reads, [paths.checkpoints, paths.metrics, paths.online_log])
    from lopd_megatron.parallel import prepare_megatron

    prepare_megatron()
    from lopd_megatron.train.loop import run

    rollouts = OnlineRollouts(config, read_prompts(config), connect(config) if launch_rank() == 0 else None)
    hooks = [*effopd_hooks(config, sys.argv[1:]), rollouts]  # the weights it accepts go to the student server
    return run(config, hooks=hooks, batches=rollouts, check=check_online_inputs)


def connect(config: RunConfig) -> Engines:
    """Clients of both servers; returns when both answer."""
    clients = []
    for name in ("student", "teacher"):
        url = getattr(config.online, f"{name}_url")
        if not url:
            raise UserError(
                f"online.{name}_url is empty; start the run with tools/train_online.py or name a server"
            )
        client = ServerClient(
            url,
            f"{name} server",
            patience_s=config.online.server_patience_s,
            max_in_flight=2 * config.rollout.engine.max_num_seqs,
        )
        client.wait_until_ready()
        clients.append(client)
    return Engines(clients[0], clients[1], sampling(config))


def sampling(config: RunConfig) -> Sampling:
    """Of the rollouts. Only temperature 1 and top-p 1 sample the policy that is trained."""
    rollout = config.rollout
    if rollout.temperature != 1 or rollout.top_p != 1:
        raise UserError(
            f"rollout.temperature={rollout.temperature}, rollout.top_p={rollout.top_p}: standard OPD needs 1 "
            "and 1, where student and teacher are compared at the temperature that was sampled"
        )
    stop = stop_token_ids(config.model.student, rollout.stop_token_ids)
    return Sampling(1.0, 1.0, rollout.max_response_tokens, stop)


def read_prompts(config: RunConfig) -> list[Prompt]:
    """All prompts of the run, in the order of the shards."""
    folder = config.paths.prompts
    manifests = shards.complete_manifests(folder, "prompts")
    tables = [shards.read_table(folder, index, PROMPT_SCHEMA) for index in range(len(manifests))]
    return [
        Prompt(name, tokens)
        for table in tables
        for name, tokens in zip(
            table["prompt_id"].to_pylist(), table["prompt_tokens"].to_pylist(), strict=True
        )
    ]


def check_online_inputs(config: RunConfig) -> Inputs:
    """The lineage rules without a dataset: what is scored is sampled by the student that is trained."""
    student, teacher = config.model.student, config.model.teacher
    reason = check_consistency(
        student=student,
        teacher=teacher,
        objective=config.loss.objective,
        allow_mismatch=config.lineage.allow_mismatch,
    )
    start, parent = model_fingerprint(student), read_model_lineage(student)
    folder = config.paths.prompts
    content = shards.content_hash(shards.complete_manifests(folder, "prompts"))
    rollouts = hashlib.sha256(f"{content} {model_fingerprint(teacher)['fingerprint']}".encode()).hexdigest()
    lineage = Lineage(
        teacher=model_fingerprint(teacher),
        sft_teacher=parent.sft_teacher,
        start=start,
        tokenizer=tokenizer_fingerprint(student),
        parents=[start["fingerprint"], content],
        allow_mismatch=reason,
    )
    source = {"kind": "prompts and teacher", "fingerprint": rollouts, "origin": str(folder)}
    return Inputs(start, source, lineage.model_dump())


if __name__ == "__main__":
    run_rank(main)
