"""Every service against its own OpenAPI document: requests that fit it and requests that do not, made by schemathesis.

No generated request may be answered with 5xx, and every answer has a status, a content type and a body that the
document names. ``make fuzz`` runs the same with many more requests and another seed each time.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from services.contracts.constitution import load_constitution
from services.critique.app import build_app as build_critique
from services.critique.backend import load_model
from services.critique.settings import CritiqueSettings
from services.safety.app import build_app as build_safety
from services.safety.assemble import build_backend
from services.safety.settings import SafetySettings
from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_stack import gateway
from tests.fakes.gateway_upstreams import FakeSafety
from tests.fakes.gateway_upstreams import serving as serving_fake
from tests.fakes.model_servers import serving, serving_inference
from tests.fakes.tiny_model import build_tiny_adapter, build_tiny_model

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
CHECKS = ",".join(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "unsupported_method",
    ]
)


@contextmanager
def safety(model: Path) -> Iterator[str]:
    wanted = SafetySettings(tier="ngram")
    with serving(build_safety(wanted, build_backend(wanted))) as url:
        yield url


@contextmanager
def critique(model: Path) -> Iterator[str]:
    wanted = CritiqueSettings(model=str(model), critique_tokens=2, revision_tokens=2)
    with serving(build_critique(wanted, load_constitution(wanted.constitution), load_model(wanted))) as url:
        yield url


@contextmanager
def inference(model: Path) -> Iterator[str]:
    adapters = model.parent / "adapters"
    build_tiny_adapter(adapters / "r1", model, seed=1)
    with serving_inference(model, adapters_dir=adapters, max_answer_tokens=4) as url:
        yield url


@contextmanager
def gateway_with_fakes(model: Path) -> Iterator[str]:
    with ExitStack() as exits:
        inference_url, safety_url = (
            exits.enter_context(serving_fake(fake)) for fake in (FakeInference(), FakeSafety())
        )
        yield exits.enter_context(gateway(inference_url, safety_url))


SERVICES: list[Callable[[Path], AbstractContextManager[str]]] = [safety, critique, inference, gateway_with_fakes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("fuzz") / "tiny")


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.__name__)
def test_answers_are_as_documented(
    service: Callable[[Path], AbstractContextManager[str]], model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", "--checks", CHECKS, "--continue-on-failure"]
    command += ["--max-examples", EXAMPLES or "20", "--phases", "examples,coverage,fuzzing", "--no-color"]
    command += ["--suppress-health-check", "all", "--warnings", "off"]
    command += ["--generation-database", "none"] if EXAMPLES else ["--generation-deterministic"]
    with service(model) as url:
        done = subprocess.run([*command, f"{url}/openapi.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
