"""How `make test` spreads the tests over its processes: whole files, what takes long first.

A file stays in one process, which builds its fixtures once. tests/distributed stays together, so that no two
worlds of ranks run at once; so does tests/slurm, whose files share one Slurm and one chain of jobs, but for
NeMo-Run's, which is as long as the rest and has a Slurm of its own. Short files come last and fill the end.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Generator
from typing import Any

import pytest

from tests.helpers.imports import quick_imports

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


STARTS_A_PROCESS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [not item.nodeid.startswith(path) for path in SLOW_FIRST])
    if config.getoption("--no-processes"):
        left_out = [item for item in items if item.get_closest_marker("processes")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True, scope="session")
def no_processes(request: pytest.FixtureRequest) -> None:
    """With `--no-processes` a test that starts one all the same fails, and says which it was."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS_A_PROCESS:
            raise AssertionError(f"starts a process ({event} {arguments[:2]}): mark it `processes`")

    if request.config.getoption("--no-processes"):
        sys.addaudithook(refuse)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--only-known-skips",
        action="store_true",
        help="fail when a test was skipped for anything but a missing GPU, or a system package that this "
        "user cannot install",
    )
    parser.addoption(
        "--no-processes",
        action="store_true",
        help="leave out tests that start a process, which are marked",
    )


def is_known_skip(reason: str) -> bool:
    """Whether `make test` cannot do anything about the reason for which a test was skipped."""
    can_install = os.getuid() == 0 and shutil.which("apt-get") is not None
    return "needs CUDA" in reason or ("needs the Debian package" in reason and not can_install)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not session.config.getoption("--only-known-skips"):
        return
    skipped = {str(report.longrepr[-1]) for report in reporter.stats.get("skipped", [])}
    if unknown := sorted(reason for reason in skipped if not is_known_skip(reason)):
        reporter.section("skipped tests that should have run", red=True)
        reporter.write_line("\n".join(unknown))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
