"""What several test files share: gateways and a coordinator that run, and clients of a file's own fixture ``url``."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from prometheus_client import REGISTRY

from tests.fakes.gateway_stack import (
    HASTY_CHECKS,
    HASTY_MODEL,
    PATIENT,
    UNCHECKED,
    Stack,
    gateway,
    wait_for,
)
from tests.fakes.gateway_upstreams import FakeInference, FakeSafety, serving

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
