"""How `make test` spreads the tests over its processes: whole files, what takes long first.

A file stays in one process, which builds its fixtures once. tests/distributed stays together, so that no two
worlds of ranks run at once; so does tests/slurm, whose files share one Slurm and one chain of jobs, but for
NeMo-Run's, which is as long as the rest and has a Slurm of its own. Short files come last and fill the end.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from lopd_megatron.imports import quick_imports

NEMO_RUN = "tests/slurm/test_nemo_run.py"
SLOW_FIRST = (
    "tests/distributed/",
    "tests/slurm/test_pipeline.py",
    "tests/e2e/test_pipeline.py",
    "tests/e2e/test_online.py",
    NEMO_RUN,
    "tests/slurm/",
    "tests/e2e/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [not item.nodeid.startswith(path) for path in SLOW_FIRST])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """All test modules are imported here, and with them torch, transformers and Megatron-Core."""
    with quick_imports():
        return (yield)


@pytest.hookimpl(optionalhook=True)  # plain pytest has no pytest-xdist to ask
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class WholeFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = file.rpartition("/")[0]
            together = folder in ("tests/distributed", "tests/slurm") and file != NEMO_RUN
            return folder if together else file

    config.option.loadscopereorder = False  # or the files with most tests come first, which are short
    return WholeFiles(config, log)
