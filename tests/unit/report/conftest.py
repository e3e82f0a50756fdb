from pathlib import Path

import pytest

from tests.unit.report.sample_run import sample_run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every stage done. Tests that change it work on a copy."""
    return sample_run(tmp_path_factory.mktemp("report"))
