"""How `make test` spreads all but tests/distributed over its processes: whole files, what takes long first.

A file stays in one process, which builds its fixtures once. tests/slurm stays together, because its files
share one Slurm and one chain of jobs. Short files come last and fill the end.
"""

from __future__ import annotations

from typing import Any

import pytest

SLOW_FOLDERS = ("tests/slurm/", "tests/e2e/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in SLOW_FOLDERS])


@pytest.hookimpl(optionalhook=True)  # plain pytest has no pytest-xdist to ask
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class WholeFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # or the files with most tests come first, which are short
    return WholeFiles(config, log)
