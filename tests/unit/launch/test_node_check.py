from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from lopd_megatron.launch import node_check


def test_local_problems_name_value_and_limit(tmp_path: Path) -> None:
    assert node_check.local_problems(tmp_path, 0, 0.001) == []
    (problem,) = node_check.local_problems(tmp_path, 8, 0.001)
    assert problem.endswith("of 8 GPUs are visible")
    (problem,) = node_check.local_problems(tmp_path, 0, 1e9)
    assert "GiB free, less than 1000000000" in problem
    (problem,) = node_check.local_problems(Path("/proc/nothing"), 0, 0.001)
    assert "cannot write to /proc/nothing" in problem
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_off_is_pinned_on_its_node() -> None:
    assert node_check.clock_problems({"n1": 1000.0, "n2": 1000.5, "n3": 999.9}) == {}
    assert node_check.clock_problems({"n1": 1000.0, "n2": 1900.0, "n3": 1000.1}) == {
        "n2": "its clock is +900 s off"
    }


def test_a_silent_node_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes of two ranks; rank 3, on the second, never speaks."""
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 4,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "localhost",
    }.items():
        monkeypatch.setenv(name, str(value))
    store = dist.TCPStore("localhost", 0, 1, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 4)]))
    rendezvous = node_check.Rendezvous(["n1", "n2"], timedelta(seconds=0.3))
    for rank in (0, 1, 2):
        rendezvous.rank = rank
        rendezvous.publish("local", [])
    told = rendezvous.gather("local")
    assert told == {"n1": [[], []]}
    assert not rendezvous.decide("local", {"n2": "did not start"})
    assert capsys.readouterr().out == "node n2: did not start\n"
