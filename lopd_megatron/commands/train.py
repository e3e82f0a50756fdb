"""Trains the student of a recipe on this machine, with as many processes as its layout needs.

    lopd train recipes/tiny.py:lightning_opd [section.key=value ...]

Starts `python -m lopd_megatron.launch.torchrun … -m lopd_megatron.train`. Standard OPD: also starts a vLLM
server of the student and one of the teacher, unless online.student_url and online.teacher_url name them; a
server that dies is started again. On several nodes use `lopd run --on slurm --stages train`.
Continues from the newest checkpoint below run_dir. Exit codes: 0 done, 85 saved and stopped (start the same
command again), 2 wrong input, 1 any other failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import TYPE_CHECKING

from lopd_megatron import cli
from lopd_megatron.config import RunConfig
from lopd_megatron.launch.stages import processes_per_node
from lopd_megatron.layout_check import check_layout
from lopd_megatron.progress import log_line

if TYPE_CHECKING:
    from lopd_megatron.inference.server import VllmServer

POLL_S = 1.0


def main() -> int:
    config, options = cli.parse(cli.parser(__doc__))
    check_layout(config)
    if options.dry_run:
        return show_plan(config)
    command = training_command(config)
    if not config.online.enabled or (config.online.student_url and config.online.teacher_url):
        return train(command, [], dict(os.environ))
    return train_with_servers(config, command)


def show_plan(config: RunConfig) -> int:
    """Print what training would read and write. Returns exit code 0."""
    paths, model = config.paths, config.model
    held_out = [*config.data.valid_prefixes, *config.effopd.accuracy_problems]
    if config.online.enabled:
        reads = [model.student, model.teacher, paths.prompts, *held_out]
        return cli.dry_run(config, reads, [paths.checkpoints, paths.metrics, paths.config, paths.online_log])
    reads = [model.student, *config.dataset_prefixes, *held_out]
    return cli.dry_run(config, reads, [paths.checkpoints, paths.metrics, paths.config])


def training_command(config: RunConfig) -> list[str]:
    """The launcher with this program's own arguments."""
    launcher = [sys.executable, "-m", "lopd_megatron.launch.torchrun", "--standalone"]
    processes = ["--nproc-per-node", str(processes_per_node(config))]
    return [*launcher, *processes, "-m", "lopd_megatron.train", *sys.argv[1:]]


def train_with_servers(config: RunConfig, command: list[str]) -> int:
    """Start the servers that the configuration does not name, and train beside them."""
    from lopd_megatron.commands.servers import missing_servers
    from lopd_megatron.inference.server_key import KEY_VARIABLE, own_key

    key = own_key(config.online.key_file)
    servers = missing_servers(config, key)
    with contextlib.ExitStack() as stack:
        for server in servers.values():
            stack.enter_context(server)
        for server in servers.values():
            server.wait()
        urls = [f"online.{name}_url={server.url}" for name, server in servers.items()]
        return train([*command, *urls], list(servers.values()), os.environ | {KEY_VARIABLE: key})


def train(command: list[str], servers: list[VllmServer], environment: dict[str, str]) -> int:
    """Run the ranks; signals go to them, and a server that dies is started again in its place."""
    training = subprocess.Popen(command, env=environment)

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
                    log_line(f"{server.name} ended; starting it again")
                    server.start()
