"""What several test files share: gateways, a coordinator, databases, and clients of a file's own fixture ``url``."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from prometheus_client import REGISTRY

from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_repairs import RepairStack, repairing
from tests.fakes.gateway_stack import (
    HASTY_CHECKS,
    HASTY_MODEL,
    PATIENT,
    UNCHECKED,
    Stack,
    gateway,
    wait_for,
)
from tests.fakes.gateway_upstreams import FakeCritique, FakeSafety, serving
from tests.fakes.postgres_server import PostgresServer

if TYPE_CHECKING:
    from tests.fakes.federation import Federation


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Federation"]:
    """A federation's coordinator without silos: what reaches it, and what it refuses."""
    from tests.fakes.federation import running_coordinator

    with running_coordinator(tmp_path_factory.mktemp("coordinator")) as running:
        yield running


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def running() -> Iterator[Stack]:
    inference, safety = FakeInference(), FakeSafety()
    with ExitStack() as exits:
        inference_url, safety_url = (exits.enter_context(serving(fake)) for fake in (inference, safety))
        urls = [
            exits.enter_context(gateway(inference_url, safety_url, limits))
            for limits in (PATIENT, HASTY_CHECKS, HASTY_MODEL)
        ]
        client, checks, model = (exits.enter_context(httpx.Client(base_url=url, timeout=20)) for url in urls)
        yield Stack(urls[0], inference, safety, client, {"safety": checks, "inference": model})


@pytest.fixture
def stack(running: Stack) -> Iterator[Stack]:
    """The shared stack with fresh fakes.

    After the test, not one character may have left before its verdict, and no upstream may be at work any more.
    """
    for fake, fresh in ((running.inference, FakeInference()), (running.safety, FakeSafety())):
        vars(fake).update({name: value for name, value in vars(fresh).items() if name != "at_work"})
    before = REGISTRY.get_sample_value(UNCHECKED)
    yield running
    assert REGISTRY.get_sample_value(UNCHECKED) == before
    for service in (running.inference, running.safety):
        wait_for(lambda service=service: service.at_work == 0)


@pytest.fixture(scope="module")
def running_repairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RepairStack]:
    with repairing(tmp_path_factory.mktemp("repair")) as stack:
        yield stack


@pytest.fixture
def repairs(running_repairs: RepairStack) -> Iterator[RepairStack]:
    """The shared stack with fresh fakes; after the test, nothing may have left before its verdict."""
    pairs = (
        (running_repairs.inference, FakeInference()),
        (running_repairs.safety, FakeSafety()),
        (running_repairs.critique, FakeCritique()),
    )
    for fake, fresh in pairs:
        vars(fake).update({name: value for name, value in vars(fresh).items() if name != "at_work"})
    before = REGISTRY.get_sample_value(UNCHECKED)
    yield running_repairs
    assert REGISTRY.get_sample_value(UNCHECKED) == before
    for fake, _ in pairs:
        wait_for(lambda fake=fake: fake.at_work == 0)


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    server.start()
    yield server
    server.remove()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/folder/audit.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def audit_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        found: str = request.getfixturevalue("sqlite_url")
        return found
    server: PostgresServer = request.getfixturevalue("postgres")
    server.sql("DROP TABLE IF EXISTS fedward_audit")
    return server.url
