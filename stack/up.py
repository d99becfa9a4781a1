"""``make up`` and ``make down``: the services and the gateway in the background, until they are stopped.

What ``up`` starts carries a mark, which is kept in ``<run dir>/mark``. ``down`` ends exactly what carries it.
"""

from pathlib import Path

import psutil
from rich.console import Console

from services.contracts.adapters import MANIFEST, read_manifest
from services.contracts.errors import AdapterError, ConfigError
from stack.marks import end, kill_marked, marked
from stack.processes import STOP_SECONDS, Processes, Service, port_is_free

GATEWAY_PORT, SAFETY_PORT, CRITIQUE_PORT, INFERENCE_PORT = 8080, 8101, 8102, 8103
BASE_MODEL = "fedward-miniature"
STATE = "mark"


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
    flags = [flag for name in ("inference", "safety", "critique") for flag in (f"--{name}-url", urls[name])]
    return Service("gateway", "gateway", port, tuple(flags))


def up(run_dir: Path, release: Path | None, console: Console) -> None:
    """Start the stack and leave it running.

    Args:
        run_dir: where the logs and the processes' mark go.
        release: an adapter directory to serve; the base model when None.
        console: where progress is shown.

    Raises:
        AdapterError: there is no whole adapter in ``release``.
        ConfigError: the stack runs already, or a port is taken.
        ProcessFailed: a process ended or was not ready in time; all others are stopped.
    """
    served = describe_model(release)
    if living(run_dir):
        raise ConfigError(f"the stack of {run_dir} runs already; `make down` stops it")
    serve = ("--release", str(release.resolve())) if release else ()
    services = service_plan(SAFETY_PORT, CRITIQUE_PORT, INFERENCE_PORT, *serve)
    plan = [*services, gateway_plan(GATEWAY_PORT, services)]
    for service in plan:
        if not port_is_free(service.port):
            raise ConfigError(f"port {service.port} for {service.name} is in use; stop what listens there first")
    with Processes(run_dir) as processes:
        (run_dir / STATE).write_text(processes.mark)
        with console.status("starting safety, critique, inference and gateway"):
            processes.start_services(plan)
        for service in plan:
            console.print(f"[green]✓[/] {service.name:10} {service.url}")
        processes.leave_running()
    text = f"\nThe gateway listens on {plan[-1].url} and serves {served}.\nLogs: {run_dir}; `make down` stops it all."
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe_model(release: Path | None) -> str:
    """What will be served, in words.

    Raises:
        AdapterError: there is no whole adapter in that folder; names those that lie in it.
    """
    if release is None:
        return "the untouched base model (--release FOLDER serves an adapter that `make demo` has released)"
    if not (release / MANIFEST).is_file():
        inside = ", ".join(str(path.parent) for path in sorted(release.glob(f"*/{MANIFEST}")))
        hint = f"did you mean {inside}?" if inside else "`make demo` leaves one in runs/demo/release"
        raise AdapterError(f"--release {release}: no adapter there; {hint}", param="release")
    return f"the adapter {release.resolve().name} (sha256 {read_manifest(release).sha256[:12]})"


def living(run_dir: Path) -> list[psutil.Process]:
    """The processes of an earlier ``up`` that still run, last started first.

    Raises:
        ConfigError: the file with their mark is damaged.
    """
    try:
        return marked((run_dir / STATE).read_text(errors="replace"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except ValueError as error:
        raise ConfigError(f"{run_dir / STATE}: {error}; stop the processes by hand and remove the file") from error


def down(run_dir: Path, console: Console) -> None:
    """Stop what ``up`` started, letting in-flight requests finish; says so when nothing runs."""
    processes = living(run_dir)
    for process in processes:  # the gateway first: it needs the services for what it still has to answer
        end(process, STOP_SECONDS)
    if processes:
        kill_marked((run_dir / STATE).read_text())
    (run_dir / STATE).unlink(missing_ok=True)
    text = f"stopped {len(processes)} processes" if processes else f"nothing of {run_dir} was running"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
