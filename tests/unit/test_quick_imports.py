"""Imports without Python's collector."""

from __future__ import annotations

import gc

import pytest

from lopd_megatron.imports import quick_imports


def test_the_collector_rests_and_forgets_what_was_made() -> None:
    frozen = gc.get_freeze_count()
    with quick_imports():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(kept)


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
