"""The key of a server: who gets in, and where it is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lopd_megatron.errors import UserError
from lopd_megatron.inference.server_key import KEY_VARIABLE, KeyMiddleware, own_key, read_key, write_key

KEY = "0123456789abcdef"


def answer(monkeypatch: pytest.MonkeyPatch, kind: str, *given: bytes) -> list[str]:
    """What a request with these Authorization headers gets: the app itself, or the middleware's answer."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append("app")

    async def send(message: Any) -> None:
        seen.append(str(message.get("status", message.get("code", "body"))))

    monkeypatch.setenv(KEY_VARIABLE, KEY)
    scope = {"type": kind, "headers": [(b"authorization", value) for value in given]}
    asyncio.run(KeyMiddleware(app)(scope, None, send))
    return seen


def test_only_the_key_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    good = f"Bearer {KEY}".encode()
    assert answer(monkeypatch, "http", good) == ["app"]
    for wrong in ((), (b"",), (KEY.encode(),), (good + b"0",), (good, good), (b"bearer " + KEY.encode(),)):
        assert answer(monkeypatch, "http", *wrong) == ["401", "body"]
    assert answer(monkeypatch, "websocket") == ["1008"]
    assert answer(monkeypatch, "lifespan") == ["app"]


def test_a_server_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="not set"):
        KeyMiddleware(None)  # type: ignore[arg-type]


def test_where_a_key_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert len(own_key()) >= 32
    assert own_key() != own_key()
    file = tmp_path / "key"
    write_key(str(file), KEY)
    assert own_key(str(file)) == read_key(str(file)) == KEY
    assert file.stat().st_mode & 0o077 == 0
    monkeypatch.setenv(KEY_VARIABLE, "of the environment")
    assert own_key(str(file)) == "of the environment"


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [(KEY, 0o644, "chmod 600"), ("short", 0o600, "at least 16"), (None, 0, "No such file")],
)
def test_a_key_file_that_protects_nothing_is_refused(
    tmp_path: Path, text: str | None, mode: int, message: str
) -> None:
    file = tmp_path / "key"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(UserError, match=message):
        read_key(str(file))
