"""Run one federation to its end on a coordinator that is up, however often its ServerApp is lost on the way.

Flower cannot resume a run, but ours can: what a finished round left in the run folder is where the next attempt goes
on. Whether a ServerApp lives is told by the lock that it holds on the run folder, which ends with the process.
"""

import contextlib
import fcntl
import json
import subprocess
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.common.files import replace_file
from services.contracts.errors import FedwardError
from stack.federation.coordinator import cli_home, superlink_address, wait_for_superlink
from stack.federation.flower import CONNECTION, flower, write_connection
from stack.federation.settings import CoordinatorConfig

START_SECONDS = 240.0  # from the submission until the ServerApp has imported everything, on a busy machine
POLL_SECONDS = 0.5
ASK_SECONDS = 20.0  # between questions to the SuperLink, each of which is a process
COMMAND_SECONDS = 120.0
LOCK = "lock"  # held by the ServerApp in its run folder, see trainer/run_folder.py
IN_USE = "already in use"


class FederationFailed(FedwardError):
    """The federation did not reach its end."""

    code = "federation_failed"
    exit_code = 9


class FlowerRefused(FedwardError):
    """A command of Flower's ended with an error."""

    code = "flower_refused"
    exit_code = 9


def train(config: CoordinatorConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the federation; returns the content of ``result.json``.

    Args:
        config: the coordinator's settings; its processes run already, or are being started.
        say: told what happens, a line at a time.

    Raises:
        ProcessFailed: the SuperLink does not answer.
        FlowerRefused: the SuperLink refused the run.
        FederationFailed: the run failed, or its ServerApp was lost too often.
    """
    connect(config)
    note = config.state_dir / "run-id"
    if note.exists():  # of an earlier command that was killed: two ServerApps must not share a run folder
        stop_run(config, note.read_text())
    for attempt in range(1, config.attempts + 1):
        (config.run_dir / "result.json").unlink(missing_ok=True)
        run_id = submit(config)
        replace_file(note, run_id.encode())
        say(f"run {run_id} is submitted (attempt {attempt} of {config.attempts})")
        result = wait_for_end(config, run_id)
        keep_log(config, run_id, attempt)
        if result is None:
            say("the ServerApp was lost; the run is submitted again and goes on after its last finished round")
            stop_run(config, run_id)
            continue
        note.unlink()
        if result["status"] != "completed":
            raise FederationFailed(f"the run failed: {result['error']}")
        return result
    raise FederationFailed(f"the ServerApp was lost {config.attempts} times; see {config.state_dir / 'logs'}")


def wait_for_end(config: CoordinatorConfig, run_id: str) -> dict[str, Any] | None:
    """Wait for the run's result; None when the ServerApp ended without one.

    Raises:
        FederationFailed: the ServerApp did not get as far as the run folder, or not within ``START_SECONDS``.
    """
    deadline = time.monotonic() + START_SECONDS
    ask_at = time.monotonic() + ASK_SECONDS
    seen = False
    while True:
        alive = is_held(config.run_dir / LOCK)
        if (config.run_dir / "result.json").exists():  # looked for after the lock, which is released after it is there
            result: dict[str, Any] = json.loads((config.run_dir / "result.json").read_text())
            return result
        if seen and not alive:
            return None
        seen = seen or alive
        if not seen and time.monotonic() > ask_at:
            status, details = run_status(config, run_id)
            if status.startswith("finished"):
                raise FederationFailed(f"the run is {status} before its first round: {details}")
            if time.monotonic() > deadline:
                raise FederationFailed(f"the run is {status} after {START_SECONDS:.0f} s; is the SuperExec running?")
            ask_at = time.monotonic() + ASK_SECONDS
        time.sleep(POLL_SECONDS)


def run_status(config: CoordinatorConfig, run_id: str) -> tuple[str, str]:
    """What the SuperLink says of a run: its status, and details."""
    found = json.loads(_flwr(config, "ls", CONNECTION, "--run-id", run_id, "--format", "json"))["runs"][0]
    return found["status"], found["status-details"]


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def register_silos(config: CoordinatorConfig, say: Callable[[str], None]) -> None:
    """Tell the SuperLink the silos' public keys; the name of a key binds it to a client number.

    Raises:
        FlowerRefused: the SuperLink refused a key; one that it knows already is left as it is.
    """
    connect(config)
    for number, key in enumerate(config.silo_keys):
        try:
            _flwr(config, "supernode", "register", str(key), CONNECTION, "--name", f"client-{number}")
        except FlowerRefused as error:
            if IN_USE not in error.message:
                raise
        say(f"client {number} is registered by {key}")


def connect(config: CoordinatorConfig) -> None:
    """Wait for the SuperLink, and tell the command ``flwr`` where it is."""
    wait_for_superlink(config)
    write_connection(cli_home(config), superlink_address(config), config.credentials.authority)


def submit(config: CoordinatorConfig) -> str:
    """Start a run of the signed bundle; returns the run's id."""
    overrides = str(config.run_config.resolve())
    answer = _flwr(config, "run", app_id(config.bundle), CONNECTION, "--run-config", overrides, "--format", "json")
    run_id: str = json.loads(answer)["run-id"]
    return run_id


def app_id(bundle: Path) -> str:
    """What Flower calls a bundle: ``@publisher/name==version``."""
    with zipfile.ZipFile(bundle) as archive:
        project = tomllib.loads(archive.read("pyproject.toml").decode())
    name, version = project["project"]["name"], project["project"]["version"]
    return f"@{project['tool']['flwr']['app']['publisher']}/{name}=={version}"


def stop_run(config: CoordinatorConfig, run_id: str) -> None:
    """End a run, as far as the SuperLink knows it; one that has ended stays so."""
    with contextlib.suppress(FlowerRefused):
        _flwr(config, "stop", run_id, CONNECTION)


def keep_log(config: CoordinatorConfig, run_id: str, attempt: int) -> None:
    """Fetch what the ServerApp logged, which the SuperLink keeps."""
    try:
        text = _flwr(config, "log", run_id, CONNECTION, "--show")
    except FlowerRefused as error:
        text = error.message
    replace_file(config.state_dir / "logs" / f"serverapp-{attempt}.log", text.encode())


def _flwr(config: CoordinatorConfig, *arguments: str) -> str:
    """Run one ``flwr`` command; returns what it printed."""
    command = flower("flwr", cli_home(config), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise FlowerRefused(f"flwr {arguments[0]}: no answer within {COMMAND_SECONDS:.0f} s") from error
    said = done.stdout + done.stderr
    if done.returncode != 0 or '"success": false' in done.stdout:
        raise FlowerRefused(f"flwr {' '.join(arguments[:2])}: {' '.join(said.split())[:500]}")
    return done.stdout
