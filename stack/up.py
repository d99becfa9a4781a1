"""``make up`` and ``make down``: the services and the gateway in the background, until they are stopped.

The processes' ids and start times are kept in ``<run dir>/processes.json``, so that ``down`` ends exactly what
``up`` started, even if an id has been given to another process since.
"""

import json
from pathlib import Path

import psutil
from rich.console import Console

from services.contracts.errors import ConfigError
from stack.processes import Processes, Service, port_is_free

GATEWAY_PORT, SAFETY_PORT, CRITIQUE_PORT, INFERENCE_PORT = 8080, 8101, 8102, 8103
BASE_MODEL = "fedward-miniature"
STATE = "processes.json"


def service_plan(safety: int, critique: int, inference: int, *inference_flags: str) -> list[Service]:
    """The three services on these ports."""
    return [
        Service("safety", "services.safety", safety),
        Service("critique", "services.critique", critique),
        Service("inference", "services.inference", inference, ("--model-id", BASE_MODEL, *inference_flags)),
    ]


def gateway_plan(port: int, services: list[Service]) -> Service:
    """The gateway in front of those services."""
    urls = {service.name: service.url for service in services}
    flags = ("--inference-url", urls["inference"], "--safety-url", urls["safety"])
    return Service("gateway", "gateway", port, flags)


def up(run_dir: Path, release: Path | None, console: Console) -> None:
    """Start the stack and leave it running.

    Args:
        run_dir: where logs and process ids go.
        release: an adapter directory to serve; the base model when None.
        console: where progress is shown.

    Raises:
        ConfigError: the stack runs already, or a port is taken.
        ProcessFailed: a process ended or was not ready in time; all others are stopped.
    """
    if living(run_dir):
        raise ConfigError(f"the stack of {run_dir} runs already; `make down` stops it")
    serve = ("--release", str(release.resolve())) if release else ()
    services = service_plan(SAFETY_PORT, CRITIQUE_PORT, INFERENCE_PORT, *serve)
    plan = [*services, gateway_plan(GATEWAY_PORT, services)]
    for service in plan:
        if not port_is_free(service.port):
            raise ConfigError(f"port {service.port} for {service.name} is in use; stop what listens there first")
    with Processes(run_dir) as processes:
        with console.status("starting safety, critique, inference and gateway"):
            processes.start_services(plan)
        for service in plan:
            console.print(f"[green]✓[/] {service.name:10} {service.url}")
        started = [
            {"name": name, "pid": p.pid, "started": psutil.Process(p.pid).create_time()}
            for name, p in processes.running.items()
        ]
        (run_dir / STATE).write_text(json.dumps(started, indent=2))
        processes.running.clear()
    console.print(
        f"\nThe gateway listens on http://127.0.0.1:{GATEWAY_PORT}; logs: {run_dir}; `make down` stops it all."
    )


def living(run_dir: Path) -> list[psutil.Process]:
    """The processes of an earlier ``up`` that still run."""
    try:
        entries = json.loads((run_dir / STATE).read_text())
    except FileNotFoundError:
        return []
    found = []
    for entry in entries:
        if psutil.pid_exists(entry["pid"]):
            process = psutil.Process(entry["pid"])
            if abs(process.create_time() - entry["started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def down(run_dir: Path, console: Console) -> None:
    """Stop what ``up`` started, letting in-flight requests finish; says so when nothing runs."""
    processes = living(run_dir)
    for process in processes:
        process.terminate()
    _, stubborn = psutil.wait_procs(processes, timeout=25)
    for process in stubborn:
        process.kill()
    (run_dir / STATE).unlink(missing_ok=True)
    console.print(f"stopped {len(processes)} processes" if processes else f"nothing of {run_dir} was running")
