"""Nodes that must not get in, each told why; and what a silo in a network of its own can reach at all."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from services.common.ports import free_port
from stack.federation import credentials
from stack.federation.credentials import Credentials, make_certificates, make_credentials
from stack.federation.network import Network, inside, may_separate, network
from stack.federation.plan import FederationPlan, write_configs
from stack.federation.settings import SiloConfig
from stack.federation.silo import explain, supernode
from stack.processes import Processes
from tests.fakes.federation import Federation, make_parties, wait_for
from tests.fakes.recorder import recording

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed"),
]
WRONG_CLOCK = """
import sys
from datetime import timedelta
from flwr.supernode import node_auth_http_interceptor as signing
from flwr.supernode.cli import flower_supernode
seconds, *sys.argv = sys.argv[1:]
now = signing.now
signing.now = lambda: now() + timedelta(seconds=float(seconds))
flower_supernode()
"""
PROBE = """
import json, socket, sys
host, hosts = sys.argv[1], sys.argv[2:]
def reaches(address, port):
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((address, port)) == 0
print(json.dumps({
    "open": [port for port in range(1, 65536) if reaches(host, port)],
    "elsewhere": [other for other in hosts if reaches(other, 9092) or reaches(other, 443)],
}))
"""


def start_node(
    processes: Processes, config: SiloConfig, name: str, clock_seconds: float = 0.0
) -> "subprocess.Popen[bytes]":
    """Start a SuperNode, whose clock may be wrong."""
    node_config = config.state_dir / "node-config.toml"
    node_config.parent.mkdir(parents=True, exist_ok=True)
    node_config.write_text(f"partition-id = {config.number}\n")
    command = supernode(config, node_config)
    if clock_seconds:
        program = next(place for place, word in enumerate(command) if word.endswith("/flower-supernode"))
        command[program:program] = [sys.executable, "-c", WRONG_CLOCK, str(clock_seconds)]
    return processes.start(name, command)


def test_unknown_key_is_refused_and_explained(federation: Federation, tmp_path: Path) -> None:
    stranger = Credentials(tmp_path / "keys")
    make_credentials(stranger, ["localhost"], ["stranger"])
    key = {"private_key": stranger.silo_key("stranger"), "state_dir": tmp_path, "runtime_port": free_port()}
    with Processes(tmp_path / "logs") as processes:
        node = start_node(processes, federation.silo(0).model_copy(update=key), "stranger")
        assert node.wait(120) != 0
        assert "is not registered, or another node uses it" in explain(processes.output("stranger"))


def test_second_node_with_one_identity_is_refused_and_the_first_stays(federation: Federation, tmp_path: Path) -> None:
    first = federation.silo(0).model_copy(update={"state_dir": tmp_path / "first"})
    second = first.model_copy(update={"state_dir": tmp_path / "second", "runtime_port": free_port()})
    with Processes(tmp_path / "logs") as processes:
        honest = start_node(processes, first, "first")
        wait_for(lambda: "SuperNode ID" in processes.output("first"), "activation of the first node", 120)
        assert start_node(processes, second, "second").wait(120) != 0
        assert "another node uses it" in explain(processes.output("second"))
        assert honest.poll() is None


@pytest.mark.parametrize("seconds", [20.0, -400.0], ids=["fast", "slow"])
def test_node_with_a_wrong_clock_is_refused_and_explained(
    federation: Federation, tmp_path: Path, seconds: float
) -> None:
    config = federation.silo(0).model_copy(update={"state_dir": tmp_path, "runtime_port": free_port()})
    with Processes(tmp_path / "logs") as processes:
        start_node(processes, config, "node", clock_seconds=seconds).wait(120)
        assert "SuperNode ID" not in processes.output("node")
        assert "set the clocks" in explain(processes.output("node"))


def test_coordinator_with_a_damaged_database_says_so_and_what_to_do(tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as processes:
        federation = make_parties(tmp_path, processes, silos=1)
        federation.coordinator.state_dir.mkdir(parents=True, exist_ok=True)
        (federation.coordinator.state_dir / "superlink.db").write_bytes(b"no database" * 1000)
        federation.start_coordinator()
        wait_for(
            lambda: "superlink ended with code 1: superlink.db is damaged" in federation.log("coordinator"), "word"
        )
        assert "`register` the silos' keys again" in federation.log("coordinator")


class DayAfterTomorrow(datetime):
    """A clock of which certificates are made that are not valid yet."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "DayAfterTomorrow":
        return cls.fromtimestamp(time.time() + timedelta(days=2).total_seconds(), tz)


@pytest.mark.parametrize(
    ("lifetime", "made_at", "own_authority", "reason"),
    [
        (timedelta(days=1), datetime, False, "is not signed by this silo's authority"),
        (timedelta(days=-1), datetime, True, "the coordinator's certificate has expired"),
        (timedelta(days=1), DayAfterTomorrow, True, "the coordinator's certificate is not valid yet"),
    ],
    ids=["wrong", "expired", "not yet valid"],
)
def test_node_does_not_talk_to_a_coordinator_with_a_bad_certificate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lifetime: timedelta,
    made_at: type[datetime],
    own_authority: bool,
    reason: str,
) -> None:
    server, other = Credentials(tmp_path / "server"), Credentials(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(credentials, "datetime", made_at)
        make_certificates(server, ["127.0.0.1"], lifetime)
    make_credentials(other, ["127.0.0.1"], ["silo-0"])
    with (
        recording(1, str(server.server_bundle), str(server.authority)) as recorder,
        Processes(tmp_path / "logs") as processes,
    ):
        config = SiloConfig(
            number=0,
            state_dir=tmp_path,
            superlink=f"127.0.0.1:{recorder.port}",
            authority=server.authority if own_authority else other.authority,
            private_key=other.silo_key("silo-0"),
            task_secret=other.task_secret("silo-0"),
            trusted_entities=other.trusted_entities,
            shard=tmp_path / "shard.jsonl",
            runtime_port=free_port(),
        )
        assert start_node(processes, config, "node").wait(120) != 0
        assert reason in explain(processes.output("node"))
        assert recorder.total() == 0


@pytest.fixture
def separated() -> Iterator[Network]:
    if reason := may_separate():
        pytest.skip(reason)
    with network(2, separated=True) as net:
        yield net


def test_silo_in_its_own_network_reaches_one_port_and_nobody_else(tmp_path: Path, separated: Network) -> None:
    plan = FederationPlan(out=tmp_path, silos=2)
    make_credentials(plan.credentials, separated.hosts(), ["silo-0", "silo-1"])
    with Processes(tmp_path / "logs") as processes:
        command = [sys.executable, "-m", "trainer", "bundle", "--out", str(plan.bundle)]
        processes.run("bundle", command)
        command = [sys.executable, "-m", "stack.federation", "sign", str(plan.bundle), "--key"]
        processes.run("sign", [*command, str(plan.credentials.signing_key)])
        coordinator, _ = write_configs(plan, separated)
        command = [sys.executable, "-m", "stack.federation", "coordinator", str(coordinator)]
        processes.start("coordinator", inside(separated.coordinator, command), serves=True)
        wait_for(lambda: "the coordinator is up" in processes.output("coordinator"), "coordinator", 120)
        others = [
            separated.addresses[1],
            "10.78.1.2",
            "192.0.2.1",
            "1.1.1.1",
        ]  # the other silo, documentation, the world
        probe = inside(separated.silos[0], [sys.executable, "-c", PROBE, separated.addresses[0], *others])
        found = json.loads(processes.run("probe", probe))
    assert found == {"open": [9092], "elsewhere": []}


def test_namespaces_are_gone_after_the_block() -> None:
    if reason := may_separate():
        pytest.skip(reason)
    with network(1, separated=True) as net:
        name = str(net.coordinator)
        assert Path("/run/netns", name).exists()
    assert not Path("/run/netns", name).exists()
