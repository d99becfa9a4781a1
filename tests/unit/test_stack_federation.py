"""A federation's parts: keys and certificates, signatures, processes that are kept running, the end of a run."""

import fcntl
import json
import signal
import ssl
import stat
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from flwr.supercore.fab import Fab
from flwr.supernode.start_client_internal import _verify_fab

from services.contracts.errors import ConfigError
from stack.federation import coordinator, keeper, train
from stack.federation.bundles import serving_bundle, sign_bundle, signature_of
from stack.federation.credentials import SIGNER_ID, Credentials, certificate_end, make_certificates, make_credentials
from stack.federation.keeper import Keeper
from stack.federation.network import Network, network
from stack.federation.place import holding
from stack.federation.plan import FederationPlan, write_configs
from stack.federation.settings import CoordinatorConfig, SiloConfig, read_config
from stack.federation.silo import explain, has_to_start_again
from stack.marks import new_mark
from stack.processes import Processes, ProcessFailed
from tests.fakes.federation import NODE_LINES, wait_for
from tests.fakes.recorder import Recorder, recording
from tests.fakes.trainer_runs import run_values
from trainer.config import parse_run_config


@pytest.fixture
def credentials(tmp_path: Path) -> Credentials:
    made = Credentials(tmp_path / "certs")
    make_credentials(made, ["localhost", "127.0.0.1"], ["a", "b"])
    return made


def test_private_files_are_private_and_others_are_not(credentials: Credentials) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in credentials.folder.iterdir()}
    private = {name for name in modes if name.endswith((".key", ".secret"))} | {"coordinator-bundle.pem"}
    assert {name for name, mode in modes.items() if mode == 0o600} == private
    assert len(private) == 1 + 1 + 2 + 3 + 1  # TLS, signer, silos, secrets, TLS bundle


def test_certificate_that_ends_soon_is_told_of_at_the_start(credentials: Credentials) -> None:
    assert coordinator.expiry_notice(credentials.server_bundle) is None
    make_certificates(credentials, ["localhost"], timedelta(days=6))
    ends = datetime.now(UTC) + timedelta(days=6)
    assert f"coordinator-bundle.pem ends at {ends:%Y-%m-%d}" in str(
        coordinator.expiry_notice(credentials.server_bundle)
    )


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_file_without_a_certificate_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "coordinator.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"coordinator\.pem: (cannot be read: No such file|no certificate in PEM)"):
        certificate_end(path)


def test_made_again_silos_keep_their_keys_and_certificates_are_new(credentials: Credentials) -> None:
    before = {path.name: path.read_bytes() for path in credentials.folder.iterdir()}
    make_credentials(credentials, ["localhost"], ["a", "b"])
    changed = {path.name for path in credentials.folder.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"authority.pem", "coordinator.pem", "coordinator.key", "coordinator-bundle.pem"}


def test_certificate_is_trusted_by_its_authority_only(credentials: Credentials, tmp_path: Path) -> None:
    other = Credentials(tmp_path / "other")
    make_certificates(other, ["127.0.0.1"], timedelta(days=1))
    with recording(1, str(credentials.server_bundle), str(credentials.authority)) as server:
        for authority, reason in ((other.authority, "certificate verify failed"), (credentials.authority, None)):
            trust = ssl.create_default_context(cafile=str(authority))
            with pytest.raises(httpx.TransportError) as refused:  # also with the right one: nothing is behind the relay
                httpx.get(f"https://127.0.0.1:{server.port}/", verify=trust)
            assert ("certificate verify failed" in str(refused.value)) == (reason is not None)


def test_lifetime_below_zero_gives_an_expired_certificate(tmp_path: Path) -> None:
    made = Credentials(tmp_path)
    make_certificates(made, ["localhost"], timedelta(days=-2))
    certificate = x509.load_pem_x509_certificate(made.server_certificate.read_bytes())
    assert certificate.not_valid_before_utc < certificate.not_valid_after_utc
    assert certificate.not_valid_after_utc.timestamp() < time.time()


def test_signature_is_what_flowers_supernode_checks(credentials: Credentials, tmp_path: Path) -> None:
    bundle = tmp_path / "app.fab"
    bundle.write_bytes(b"code")
    record = json.loads(sign_bundle(bundle, credentials.signing_key).read_text())
    trusted = json.loads(credentials.trusted_entities.read_text())
    verifications = {record.pop("public_key_id"): json.dumps(record), "valid_license": "Valid"}
    assert SIGNER_ID in verifications
    assert _verify_fab(Fab("hash", b"code", verifications), trusted)
    assert not _verify_fab(Fab("hash", b"other code", verifications), trusted)
    assert not _verify_fab(Fab("hash", b"code", {}), trusted)


def test_hub_answers_as_flowers_own_does(credentials: Credentials, tmp_path: Path) -> None:
    bundle = tmp_path / "app.fab"
    bundle.write_bytes(b"code")
    with pytest.raises(ConfigError, match=r"app\.fab\.signature\.json have to be there"):
        signature_of(bundle)
    sign_bundle(bundle, credentials.signing_key)
    with serving_bundle(bundle) as url:
        answer = httpx.post(f"{url}/hub/fetch-fab", json={"app_id": "@fedward/fedward"}).json()
        assert [entry["public_key_id"] for entry in answer["verifications"]] == [SIGNER_ID]
        assert httpx.get(answer["fab_url"]).content == b"code"


def test_key_of_another_kind_signs_nothing(credentials: Credentials, tmp_path: Path) -> None:
    (tmp_path / "app.fab").write_bytes(b"code")
    with pytest.raises(ConfigError, match="Ed25519"):
        sign_bundle(tmp_path / "app.fab", credentials.silo_key("a"))


def test_process_that_ends_is_started_again_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "PAUSE_SECONDS", 0.0)
    with Processes(tmp_path / "logs") as processes:
        kept = Keeper(processes)
        kept.keep("short", [sys.executable, "-c", "print('tired')"], explain=lambda text: f"it was {text.strip()}")
        events = [wait_for(kept.look, "end", 20) for _ in range(2)]
    assert events == 2 * [["short ended with code 0: it was tired; it is started again"]]


def test_process_that_never_starts_is_given_up_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PAUSE_SECONDS", 0.0)
    with Processes(tmp_path / "logs") as processes:
        kept = Keeper(processes)
        argv = [sys.executable, "-c", "import sys; sys.exit('Failed to activate SuperNode.')"]
        kept.keep("node", argv, patience_seconds=0.3, explain=explain)
        with pytest.raises(ProcessFailed, match=r"node ended with code 1: the coordinator refuses .*see .*node\.log"):
            wait_for(lambda: kept.look() and False, "an end", 20)


def test_node_that_hangs_after_losing_its_connection_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(keeper, "CHECK_SECONDS", 0.0)
    with Processes(tmp_path / "logs") as processes:
        kept = Keeper(processes)
        code = "import time; print('ERROR: SSL/TLS handshake error detected.', flush=True); time.sleep(60)"
        kept.keep("node", [sys.executable, "-c", code], stuck=has_to_start_again)
        events = [wait_for(kept.look, "event", 20) for _ in range(2)]
    assert events == [["node hung, and was ended; it is started again"]] * 2


@pytest.mark.parametrize(("line", "lost"), NODE_LINES)
def test_what_a_node_cannot_recover_from_by_itself_is_told_from_what_it_can(line: str, lost: bool) -> None:
    assert has_to_start_again(f"INFO: SuperNode ID: 1\n{line}\n") == lost


def test_what_a_killed_command_left_running_is_ended_by_the_next(tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as processes:
        with holding(tmp_path / "state", processes.mark):
            left = processes.start("superlink", [sys.executable, "-c", "import time; time.sleep(60)"])
        assert left.poll() is None
        with holding(tmp_path / "state", new_mark()):
            assert left.wait(20) == -signal.SIGKILL


def test_second_command_in_one_folder_is_refused_and_the_first_stays(tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as processes, holding(tmp_path / "state", processes.mark):
        first = processes.start("superlink", [sys.executable, "-c", "import time; time.sleep(60)"])
        with (
            pytest.raises(ConfigError, match="state is in use by another command"),
            holding(tmp_path / "state", new_mark()),
        ):
            pass
        assert first.poll() is None


def test_trouble_of_a_process_that_goes_on_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "CHECK_SECONDS", 0.0)
    with Processes(tmp_path / "logs") as processes:
        kept = Keeper(processes)
        code = "import time; print('(sqlite3.OperationalError) database is locked', flush=True); time.sleep(60)"
        kept.keep("superlink", [sys.executable, "-c", code], explain=coordinator.explain)
        (event,) = wait_for(kept.look, "event", 20)
        assert event.startswith("superlink: superlink.db is locked for more than 5 s by another process")
        assert kept.look() == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("certificate verify failed: certificate is not yet valid", "is not valid yet: a clock is wrong"),
        ("INFO: SuperNode terminated gracefully.", "does not accept this silo's signature: set the clocks"),
        ("INFO: SuperNode ID: 7\nINFO: SuperNode terminated gracefully.", "no longer accepts this silo's signature"),
        ("ERROR: Client error '413 Request Entity Too Large' for url", "a message is larger than"),
        ("ERROR: Server error '500 Internal Server Error' for url", "is in its superlink.log"),
        ("INFO: SuperNode ID: 7", ""),
    ],
)
def test_what_flower_says_of_a_node_is_put_into_words(output: str, reason: str) -> None:
    assert (reason in explain(output)) if reason else explain(output) == ""


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("sqlite3.DatabaseError) file is not a database", "superlink.db is damaged: put a copy in its place"),
        ("sqlite3.DatabaseError) database disk image is malformed", "superlink.db is damaged"),
        ("[Errno 98] error while attempting to bind: address already in use", "its port is taken"),
    ],
)
def test_what_flower_says_of_the_superlink_is_put_into_words(output: str, reason: str) -> None:
    assert coordinator.explain(output).startswith(reason)


def test_run_has_ended_when_its_result_is_there_and_is_lost_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "POLL_SECONDS", 0.01)
    config = CoordinatorConfig.model_construct(run_dir=tmp_path)

    def serve(result: str | None) -> None:
        with (tmp_path / train.LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            started.set()
            time.sleep(0.2)
            if result:
                (tmp_path / "result.json").write_text(result)

    for result, expected in ((None, None), ('{"status": "completed"}', {"status": "completed"})):
        started = threading.Event()
        app = threading.Thread(target=serve, args=(result,))
        app.start()
        started.wait()
        assert train.is_held(tmp_path / train.LOCK)
        assert train.wait_for_end(config, "1") == expected
        app.join()
    assert not train.is_held(tmp_path / train.LOCK)


def test_files_of_a_plan_are_read_back_and_name_no_data_to_the_coordinator(tmp_path: Path) -> None:
    plan = FederationPlan(out=tmp_path)
    with network(plan.silos, separated=False) as net:
        settings, silos = write_configs(plan, net)
    assert not net.separated
    assert "shard" not in settings.read_text() + (tmp_path / "run.toml").read_text()
    assert read_config(CoordinatorConfig, settings).silo_keys[2].name == "silo-2.key.pub"
    assert [read_config(SiloConfig, file).number for file in silos] == [0, 1, 2]
    parse_run_config(run_values() | plan.run_values())


def test_parties_in_networks_of_their_own_are_reached_by_their_own_address(tmp_path: Path) -> None:
    net = Network("c", ("s0", "s1"), ("10.78.0.1", "10.78.1.1"))
    _, silos = write_configs(FederationPlan(out=tmp_path, silos=2), net)
    assert [read_config(SiloConfig, file).superlink for file in silos] == ["10.78.0.1:9092", "10.78.1.1:9092"]
    assert set(net.hosts()) == {"localhost", "127.0.0.1", "10.78.0.1", "10.78.1.1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("number = 1", "shard"), ("number = ", "not valid TOML"), ('number = 1\nshards = "x"', "shards")],
)
def test_bad_file_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "silo.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        read_config(SiloConfig, tmp_path / "silo.toml")
    assert str(tmp_path / "silo.toml") in refused.value.message


@pytest.mark.parametrize(
    "sent",
    [
        b"..Patient file 3: bread..", "..Patient file 3: bread..".encode("utf-16-le"),
        b"4:eFBhdGllbnQgZmlsZSAzOiBicmVhZHh4", b"50617469656e742066696c6520333a206272656164",
    ],
    ids=["utf-8", "utf-16", "base64", "hex"],
)  # fmt: skip
def test_recorder_finds_text_in_the_usual_encodings_and_nothing_else(sent: bytes) -> None:
    recorder = Recorder()
    recorder.stream().extend(sent)
    assert recorder.find(["Patient file 3: bread"])
    assert recorder.find(["Patients may leave on Friday", "a bread of another file"]) == []
