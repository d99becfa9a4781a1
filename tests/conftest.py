"""Fixtures for all tests: a clean environment, and the place of real benchmark data where there is one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.fakes.guard_server import FakeGuard

DATA = os.environ.get("FEDWARD_DATA")

settings.register_profile("shared-machine", deadline=None)  # a busy machine is no failure
settings.load_profile("shared-machine")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the developer's own settings."""
    for name in [name for name in os.environ if name.startswith(("FEDWARD_", "FLWR_", "OTEL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of benchmark data named by FEDWARD_DATA; the test is skipped where it is not set."""
    if not DATA:
        pytest.skip("FEDWARD_DATA is not set: this test needs the benchmark data")
    return Path(DATA)


@pytest.fixture(scope="module")
def running_guard() -> Iterator["FakeGuard"]:
    """A fake guard model that serves one module's tests."""
    from tests.fakes.guard_server import serving_guard

    with serving_guard() as guard:
        yield guard


@pytest.fixture
def guard_server(running_guard: "FakeGuard") -> "FakeGuard":
    """The module's fake guard model, in its first state."""
    running_guard.reset()
    return running_guard
