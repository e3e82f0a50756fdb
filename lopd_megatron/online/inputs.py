"""What a run of standard OPD reads: its prompts, its two servers, and the lineage rules for them."""

from __future__ import annotations

import hashlib

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.fingerprints import model_fingerprint, tokenizer_fingerprint
from lopd_megatron.inference.requests import Sampling
from lopd_megatron.inference.server_client import ServerClient
from lopd_megatron.inference.server_key import own_key
from lopd_megatron.lineage import Lineage, check_consistency, read_model_lineage
from lopd_megatron.online.batches import Engines, OnlineRollouts, Prompt
from lopd_megatron.records import PROMPT_SCHEMA
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.rollout_stage import stop_token_ids
from lopd_megatron.train.inputs import Inputs


def online_rollouts(config: RunConfig, *, is_first_rank: bool) -> OnlineRollouts:
    """The batches of a run, from live servers; only the first rank talks to them."""
    return OnlineRollouts(config, read_prompts(config), connect(config) if is_first_rank else None)


def connect(config: RunConfig) -> Engines:
    """Clients of both servers; returns when both answer."""
    clients = []
    for name in ("student", "teacher"):
        url = getattr(config.online, f"{name}_url")
        if not url:
            raise UserError(f"online.{name}_url is empty; start the run with lopd train or name a server")
        client = ServerClient(
            url,
            f"{name} server",
            key=own_key(config.online.key_file),
            patience_s=config.online.server_patience_s,
            max_in_flight=2 * config.rollouts.engine.max_num_seqs,
        )
        client.wait_until_ready()
        clients.append(client)
    return Engines(clients[0], clients[1], sampling(config))


def sampling(config: RunConfig) -> Sampling:
    """Of the rollouts. Only temperature 1 and top-p 1 sample the policy that is trained."""
    rollouts = config.rollouts
    if rollouts.temperature != 1 or rollouts.top_p != 1:
        raise UserError(
            f"rollouts.temperature={rollouts.temperature}, rollouts.top_p={rollouts.top_p}: standard OPD "
            "needs 1 and 1, where student and teacher are compared at the temperature that was sampled"
        )
    stop = stop_token_ids(config.model.student, rollouts.stop_token_ids)
    return Sampling(1.0, 1.0, rollouts.max_response_tokens, stop)


def read_prompts(config: RunConfig) -> list[Prompt]:
    """All prompts of the run, in the order of the shards."""
    folder = config.paths.prompts
    manifests = shard_files.complete_manifests(folder, "prompts")
    tables = [shard_files.read_table(folder, index, PROMPT_SCHEMA) for index in range(len(manifests))]
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
        needs_teacher=config.needs_teacher,
        allow_mismatch=config.lineage.allow_mismatch,
    )
    start, parent = model_fingerprint(student), read_model_lineage(student)
    folder = config.paths.prompts
    content = shard_files.content_hash(shard_files.complete_manifests(folder, "prompts"))
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
