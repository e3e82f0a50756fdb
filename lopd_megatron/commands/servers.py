"""A vLLM server for standard OPD, for runs on several nodes; on one node training starts its own.

    lopd serve student recipes/tiny.py:standard_opd --host ADDRESS --port 8000 online.key_file=FILE

Writes the key into `online.key_file` where there is none, readable by its owner only. Every request needs
this key. Without --host the server listens on the loopback interface. Ends with SIGTERM or Ctrl-C.
"""

from __future__ import annotations

from pathlib import Path

from lopd_megatron import cli
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.inference.server import VllmServer
from lopd_megatron.inference.server_key import own_key, read_key, write_key

ROLES = ("student", "teacher")


def serve() -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("role", choices=ROLES)
    arguments.add_argument("--host", default="127.0.0.1", help="address to listen on")
    arguments.add_argument("--port", type=int, default=8000)
    config, options = cli.parse(arguments)
    key_file = config.online.key_file
    if not key_file:
        raise UserError(
            "online.key_file is empty; name a file that all nodes share, as in online.key_file=key"
        )
    if options.dry_run:
        return cli.dry_run(config, [_model(config, options.role)], [key_file])
    if not Path(key_file).exists():
        write_key(key_file, own_key())
    server = server_of(config, options.role, read_key(key_file), host=options.host, port=options.port)
    with server:
        server.wait()
        assert server.process is not None
        return server.process.wait()


def missing_servers(config: RunConfig, key: str) -> dict[str, VllmServer]:
    """The servers that the configuration does not name, by role; not started yet."""
    urls = {"student": config.online.student_url, "teacher": config.online.teacher_url}
    return {role: server_of(config, role, key) for role in ROLES if not urls[role]}


def server_of(
    config: RunConfig, role: str, key: str, *, host: str = "127.0.0.1", port: int | None = None
) -> VllmServer:
    """The server of a role; entering it as a context starts its process."""
    is_student = role == "student"
    return VllmServer(
        f"{role} server",
        _model(config, role),
        (config.rollouts if is_student else config.scores).engine,
        config.paths.logs / f"{role}_server.log",
        task="generate" if is_student else "score",
        max_topk=max(config.scores.topk, config.loss.topk),
        devices=config.online.student_devices if is_student else config.online.teacher_devices,
        host=host,
        port=port,
        key=key,
    )


def _model(config: RunConfig, role: str) -> str:
    return config.model.student if role == "student" else config.model.teacher
