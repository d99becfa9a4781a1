"""What a silo can reach of a coordinator: Flower's Fleet API and nothing else, by the calls that Flower makes."""

import http.client
import shutil
import ssl
import subprocess
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from cryptography import x509
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushAppMessagesRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.date import now
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.fleet_http_client import FleetHttpClient

from stack.federation.coordinator import cli_home, superlink_address
from stack.federation.flower import CONNECTION, flower, write_connection
from tests.fakes.federation import Federation

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed"),
]
UNAUTHORIZED, FORBIDDEN, UNKNOWN_KEY = 401, 403, 412
Client = TypeVar("Client", bound=ProtobufClient)


@pytest.fixture
def gate(federation: Federation) -> str:
    """Where silos reach the coordinator."""
    return federation.coordinator.fleet_bind


def client_of(kind: type[Client], address: str, federation: Federation) -> Client:
    """Flower's own client of one of its APIs."""
    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    authority = federation.plan.credentials.authority.read_bytes()
    return kind.from_server_address(address, False, authority, interceptors=[version])


def status_of(error: pytest.ExceptionInfo[httpx.HTTPStatusError]) -> int:
    return error.value.response.status_code


def test_fleet_calls_pass_and_need_a_registered_key(federation: Federation, gate: str) -> None:
    with (
        client_of(FleetHttpClient, gate, federation) as fleet,
        pytest.raises(httpx.HTTPStatusError) as refused,
    ):
        fleet.PullMessages(PullMessagesRequest())
    assert status_of(refused) == UNAUTHORIZED  # the SuperLink's own answer


@pytest.mark.parametrize(
    ("shift", "status"),
    [(0, UNKNOWN_KEY), (-290, UNKNOWN_KEY), (-310, UNAUTHORIZED), (20, UNAUTHORIZED)],
    ids=["now", "slow clock", "replayed later, or too slow a clock", "too fast a clock"],
)
def test_signature_is_good_for_five_minutes(
    federation: Federation, gate: str, monkeypatch: pytest.MonkeyPatch, shift: int, status: int
) -> None:
    """Flower signs the time of a call: a good signature of a key that nobody knows gets as far as the key."""
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: now() + timedelta(seconds=shift))
    private, public = generate_key_pairs()
    signing = node_auth_http_interceptor.NodeAuthHttpInterceptor(private, public)
    request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30.0)
    authority = federation.plan.credentials.authority.read_bytes()
    with (
        FleetHttpClient.from_server_address(gate, False, authority, interceptors=[signing]) as fleet,
        pytest.raises(httpx.HTTPStatusError) as refused,
    ):
        fleet.ActivateNode(request)
    assert status_of(refused) == status


def test_control_api_is_closed_to_silos_and_open_to_the_coordinator(federation: Federation, gate: str) -> None:
    with client_of(ControlHttpClient, superlink_address(federation.coordinator), federation) as control:
        control.ListRuns(ListRunsRequest())  # the call is sound: the coordinator itself gets an answer
    with client_of(ControlHttpClient, gate, federation) as control:
        for call, request in ((control.ListRuns, ListRunsRequest()), (control.StartRun, StartRunRequest())):
            with pytest.raises(httpx.HTTPStatusError) as refused:
                call(request)
            assert status_of(refused) == FORBIDDEN


def test_submission_by_flowers_own_command_is_refused(federation: Federation, gate: str, tmp_path: Path) -> None:
    write_connection(tmp_path, gate, federation.plan.credentials.authority)
    command = flower("flwr", tmp_path, "run", "@fedward/fedward==0.1.0", CONNECTION)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "403" in done.stdout + done.stderr
    listed = flower("flwr", cli_home(federation.coordinator), "ls", CONNECTION, "--format", "json")
    assert '"runs": []' in subprocess.run(listed, capture_output=True, text=True, timeout=120).stdout


def test_runtime_api_of_server_and_client_apps_is_closed_to_silos(federation: Federation, gate: str) -> None:
    with client_of(RuntimeHttpClient, gate, federation) as runtime:
        for call, request in (
            (runtime.AcquireTask, AcquireTaskRequest()),
            (runtime.PullTaskInput, PullTaskInputRequest()),
            (runtime.PushMessages, PushAppMessagesRequest()),
        ):
            with pytest.raises(httpx.HTTPStatusError) as refused:
                call(request)
            assert status_of(refused) == FORBIDDEN


def test_task_needs_the_superexecs_secret_even_at_the_superlink(federation: Federation) -> None:
    with (
        client_of(RuntimeHttpClient, superlink_address(federation.coordinator), federation) as runtime,
        pytest.raises(httpx.HTTPStatusError) as refused,
    ):
        runtime.AcquireTask(AcquireTaskRequest())
    assert status_of(refused) == UNAUTHORIZED


def test_node_cannot_register_itself(federation: Federation, gate: str) -> None:
    with client_of(FleetHttpClient, gate, federation) as fleet, pytest.raises(httpx.HTTPStatusError) as refused:
        fleet.RegisterNode(RegisterNodeFleetRequest(public_key=b"key"))
    assert status_of(refused) == FORBIDDEN


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run", "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run",
        "//v1/fleet/pull-messages", "/v1/fleet/pull-messages/", "/V1/FLEET/PULL-MESSAGES", "/v1/fleet/", "/",
        "/health", "/docs", "/openapi.json", "/v1/fleet/pull-messages;/../../control/start-run",
    ],
)  # fmt: skip
def test_path_is_matched_whole_and_as_it_is_written(federation: Federation, gate: str, path: str) -> None:
    assert raw_status(federation, gate, "POST", path, {"Content-Length": "0"}) == FORBIDDEN


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {}, FORBIDDEN),
        ("PUT", {"Content-Length": "0"}, FORBIDDEN),
        ("POST", {}, 400),
        ("POST", {"Content-Length": str(2**30)}, 413),
    ],
    ids=["read", "put", "no length", "oversized"],
)
def test_only_posts_of_a_stated_and_sensible_size_pass(
    federation: Federation, gate: str, method: str, headers: dict[str, str], status: int
) -> None:
    assert raw_status(federation, gate, method, "/v1/fleet/pull-messages", headers) == status


def test_proxy_tells_when_the_certificate_ends_that_silos_see(federation: Federation, gate: str) -> None:
    host, port = gate.rsplit(":", 1)
    seen = x509.load_pem_x509_certificate(ssl.get_server_certificate((host, int(port)), timeout=10.0).encode())
    told = httpx.get(f"http://{federation.coordinator.status_bind}/certificate").text
    assert told == f"fedward_fleet_certificate_end_seconds {seen.not_valid_after_utc.timestamp():.0f}\n"


def raw_status(federation: Federation, gate: str, method: str, path: str, headers: dict[str, str]) -> int:
    """The status of a request whose path nothing has tidied up."""
    trust = ssl.create_default_context(cafile=str(federation.plan.credentials.authority))
    with closing(http.client.HTTPSConnection(gate, context=trust, timeout=20)) as connection:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        with connection.getresponse() as answer:
            return answer.status
