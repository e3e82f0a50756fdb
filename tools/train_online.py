"""Standard OPD: starts a vLLM server of the student and one of the teacher, and trains beside them.

    python tools/train_online.py --recipe recipes/tiny.py:standard_opd [section.key=value ...]

Reads `<run_dir>/prompts` (tools/prepare_prompts.py). Servers that run already are named by online.student_url
and online.teacher_url; those started here come back by themselves when they die, and end with the training.
On several nodes start the servers yourself and run `-m lopd_megatron.train` under torchrun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from lopd_megatron import cli
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import run_program
from lopd_megatron.inference.server import VllmServer
from lopd_megatron.inference.server_key import KEY_VARIABLE, own_key
from lopd_megatron.launch.stages import processes_per_node
from lopd_megatron.progress import say

POLL_S = 1.0


def main() -> int:
    config, options = cli.parse(cli.parser(__doc__))
    paths = config.paths
    if options.dry_run:
        reads = [config.model.student, config.model.teacher, paths.prompts]
        return cli.dry_run(config, reads, [paths.checkpoints, paths.metrics, paths.online_log, paths.logs])
    key = own_key(config.online.key_file)
    servers = missing_servers(config, key)
    with contextlib.ExitStack() as stack:
        for server in servers.values():
            stack.enter_context(server)
        for server in servers.values():
            server.wait()
        urls = [f"online.{name}_url={server.url}" for name, server in servers.items()]
        return train([*training_command(config), *sys.argv[1:], *urls], list(servers.values()), key)


def missing_servers(config: RunConfig, key: str) -> dict[str, VllmServer]:
    """The servers that the configuration does not name."""
    online, topk = config.online, max(config.scores.topk, config.loss.topk)
    logs: Path = config.paths.logs
    servers = {}
    if not online.student_url:
        servers["student"] = VllmServer(
            "student server",
            config.model.student,
            config.rollouts.engine,
            logs / "student_server.log",
            task="generate",
            max_topk=topk,
            devices=online.student_devices,
            key=key,
        )
    if not online.teacher_url:
        servers["teacher"] = VllmServer(
            "teacher server",
            config.model.teacher,
            config.scores.engine,
            logs / "teacher_server.log",
            task="score",
            max_topk=topk,
            devices=online.teacher_devices,
            key=key,
        )
    return servers


def training_command(config: RunConfig) -> list[str]:
    processes = str(processes_per_node(config))
    launcher = [sys.executable, "-m", "lopd_megatron.launch.torchrun", "--standalone"]
    return [*launcher, "--nproc-per-node", processes, "-m", "lopd_megatron.train"]


def train(command: list[str], servers: list[VllmServer], key: str) -> int:
    """Run the ranks; signals go to them, and a server that dies meanwhile is started again in its place."""
    training = subprocess.Popen(command, env=os.environ | {KEY_VARIABLE: key})

    def pass_on(number: int, frame: FrameType | None) -> None:
        training.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    while True:
        try:
            return training.wait(POLL_S)
        except subprocess.TimeoutExpired:
            for server in servers:
                if not server.is_running:
                    say(f"{server.name} ended; starting it again")
                    server.start()


if __name__ == "__main__":
    run_program(main)
