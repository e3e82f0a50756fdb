"""Imports without Python's collector."""

from __future__ import annotations

import gc
import sys
import weakref
from types import ModuleType

import pytest

from tests.helpers.imports import quick_imports


class Node:
    """An object that is its own cycle."""

    def __init__(self) -> None:
        self.itself = self


def test_the_collector_rests_and_forgets_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = gc.get_freeze_count()
    with quick_imports():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
        monkeypatch.setitem(sys.modules, "a_new_one", ModuleType("a_new_one"))
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(kept)


def test_objects_of_the_caller_are_collected_where_nothing_was_new_to_import() -> None:
    node = Node()
    seen = weakref.ref(node)
    with quick_imports():
        import json  # noqa: F401
    del node
    gc.collect()
    assert seen() is None


def test_it_comes_back_after_a_failed_import_and_stays_off_where_it_was_off() -> None:
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
