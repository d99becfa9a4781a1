"""A coordinator: Flower's SuperLink behind the proxy that lets silos reach its Fleet API only, and a SuperExec.

The SuperLink listens on the loopback: whoever reaches its Control API could submit code to every node. The SuperExec
is a process of its own (process isolation), so that a run outlives a crash of the SuperLink.
"""

import shutil
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx

from services.contracts.errors import ConfigError
from stack.federation.credentials import certificate_end
from stack.federation.flower import flower
from stack.federation.keeper import POLL_SECONDS, Keeper, first_reason
from stack.federation.settings import CoordinatorConfig
from stack.processes import Processes, ProcessFailed

PROXY_CONFIG = Path(__file__).parents[2] / "deploy" / "fleet-proxy.cfg"
READY_SECONDS = 120.0
ENDS_SOON = timedelta(days=7)
DAMAGED = (
    "superlink.db is damaged: put a copy in its place, or move it away and `register` the silos' keys again; the "
    "rounds that are finished lie in the run folder, so nothing of them is lost"
)
REASONS = (
    ("file is not a database", DAMAGED),
    ("database disk image is malformed", DAMAGED),
    ("database is locked", "superlink.db is locked for more than 5 s by another process, perhaps a backup; end that"),
    ("address already in use", "its port is taken, perhaps by a SuperLink that an earlier command left; end that"),
)


def start_coordinator(
    config: CoordinatorConfig, processes: Processes, hub_url: str, say: Callable[[str], None]
) -> Keeper:
    """Start the coordinator's processes and wait until the SuperLink answers; ``Keeper.look`` keeps them running.

    Args:
        config: the coordinator's settings.
        processes: starts them, and stops them in the end.
        hub_url: where the SuperLink gets the signed bundle.
        say: told what happens meanwhile, a line at a time.

    Raises:
        ConfigError: HAProxy is not installed, or there is no certificate.
        ProcessFailed: a process did not start.
    """
    if shutil.which("haproxy") is None:
        raise ConfigError("the command `haproxy` is missing; install it (Debian: apt-get install haproxy)")
    if notice := expiry_notice(config.credentials.server_bundle):
        say(notice)
    keeper = Keeper(processes)
    keeper.keep("superlink", superlink(config, hub_url), explain=explain)
    keeper.keep("proxy", proxy(config))
    wait_for_superlink(config, lambda: keeper.tell(say))
    keeper.keep("superexec", superexec(config))
    return keeper


def superlink(config: CoordinatorConfig, hub_url: str) -> list[str]:
    """The SuperLink's command."""
    return flower(
        "flower-superlink", config.state_dir / "superlink", "--host", "127.0.0.1", "--port", config.superlink_port,
        "--ssl-certfile", config.credentials.server_certificate, "--ssl-keyfile", config.credentials.server_key,
        "--ssl-ca-certfile", config.credentials.authority, "--enable-supernode-auth", "--isolation", "process",
        "--superexec-auth-secret-file", config.credentials.task_secret("coordinator"),
        "--database", config.state_dir.resolve() / "superlink.db", "--disable-runtime-dependency-installation",
        FLWR_SUPERGRID_API_URL=hub_url,
    )  # fmt: skip


def explain(output: str) -> str:
    """What is wrong with a SuperLink, from what it wrote."""
    return first_reason(REASONS, output)


def proxy(config: CoordinatorConfig) -> list[str]:
    """The command of the proxy that silos reach."""
    variables = {
        "FLEET_BIND": config.fleet_bind,
        "FLEET_CERT": config.credentials.server_bundle.resolve(),
        "FLEET_CERT_END": int(certificate_end(config.credentials.server_bundle).timestamp()),
        "SUPERLINK": superlink_address(config),
        "SUPERLINK_CA": config.credentials.authority.resolve(),
        "STATUS_BIND": config.status_bind,
    }
    return ["env", *(f"{name}={value}" for name, value in variables.items()), "haproxy", "-db", "-f", str(PROXY_CONFIG)]


def expiry_notice(certificate: Path) -> str | None:
    """What to say of a certificate that ends within seven days; raises ConfigError when there is none."""
    ends = certificate_end(certificate)
    if ends - datetime.now(UTC) > ENDS_SOON:
        return None
    return f"{certificate} ends at {ends:%Y-%m-%d %H:%M} UTC, and then no silo connects; see docs/operations.md"


def superexec(config: CoordinatorConfig) -> list[str]:
    """The command that starts ServerApps."""
    return flower(
        "flower-superexec", config.state_dir / "superexec", "--runtime-api-address", superlink_address(config),
        "--root-certificates", config.credentials.authority,
        "--superexec-auth-secret-file", config.credentials.task_secret("coordinator"),
    )  # fmt: skip


def superlink_address(config: CoordinatorConfig) -> str:
    """Where the SuperLink listens."""
    return f"127.0.0.1:{config.superlink_port}"


def cli_home(config: CoordinatorConfig) -> Path:
    """The home of the command ``flwr``."""
    return config.state_dir / "flwr"


def wait_for_superlink(config: CoordinatorConfig, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Wait until the SuperLink answers; raises ProcessFailed when it does not."""
    trust = ssl.create_default_context(cafile=str(config.credentials.authority))
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        meanwhile()
        try:
            if httpx.get(f"https://{superlink_address(config)}/health", verify=trust, timeout=2.0).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_SECONDS)
    raise ProcessFailed(f"the SuperLink does not answer; see {config.state_dir / 'logs'}")
