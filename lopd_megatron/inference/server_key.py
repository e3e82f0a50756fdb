"""The key of vLLM servers: every route answers 401 to a request that does not carry it.

vLLM's own `--api-key` leaves the routes open that change weights. A server reads its key from the
environment, so it is on no command line. Nodes share it through a file that only its owner can read.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from lopd_megatron.errors import UserError
from lopd_megatron.files import atomic_path

KEY_VARIABLE = "LOPD_SERVER_KEY"


def headers(key: str) -> dict[str, str]:
    """What a client sends with every request."""
    return {"Authorization": f"Bearer {key}"}


def own_key(key_file: str = "") -> str:
    """The key of this run's servers: from the environment, from `key_file`, or else a new random one."""
    if key := os.environ.get(KEY_VARIABLE, ""):
        return key
    return read_key(key_file) if key_file else secrets.token_urlsafe(32)


def read_key(key_file: str) -> str:
    """The key in a file. A missing, empty or public file is a UserError."""
    path = Path(key_file)
    try:
        mode, key = path.stat().st_mode, path.read_text().strip()
    except OSError as error:
        raise UserError(
            f"online.key_file={key_file}: {error.strerror}; `lopd serve` on the first node writes it"
        ) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"online.key_file={key_file} can be read by others; run chmod 600 {key_file}")
    if len(key) < 16:
        raise UserError(f"online.key_file={key_file} holds {len(key)} characters; give it at least 16")
    return key


def write_key(key_file: str, key: str) -> None:
    """Keep the key where only its owner can read it."""
    with atomic_path(Path(key_file)) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(key + "\n")


class KeyMiddleware:
    """ASGI middleware around all of a server; `vllm … --middleware` loads it by name."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set: a server without a key would obey anybody")
        self._expected = headers(key)["Authorization"].encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._is_known(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = b'{"error": "this server wants its key: Authorization: Bearer KEY"}'
            kind = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": kind})
            await send({"type": "http.response.body", "body": text})

    def _is_known(self, scope: Any) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
