"""A silo: its safety service, Flower's SuperNode, and the SuperExec that starts a process for each message.

Only the SuperNode talks to the coordinator. The safety service, the node's own API and the data stay here.
"""

import re
from pathlib import Path

from stack.federation.flower import flower
from stack.federation.keeper import Keeper, first_reason
from stack.federation.settings import SiloConfig
from stack.processes import Processes, Service
from stack.toml import Value, write_toml

GIVEN_UP = re.compile(r"SSL/TLS handshake error detected|(?:Client|Server) error '\d{3}")
OUT_OF_STEP = re.compile(r"is not in `RUNNING` status\. Ignoring message")
REASONS = (
    ("certificate has expired", "the coordinator's certificate has expired; it needs a new one, or a clock is wrong"),
    ("certificate is not yet valid", "the coordinator's certificate is not valid yet: a clock is wrong, here or there"),
    (
        "CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        "the coordinator's certificate is not signed by this silo's authority, or is for another host",
    ),
    (
        "Failed to activate SuperNode",
        "the coordinator refuses this silo's key: it is not registered, or another node uses it (a node that was "
        "killed counts as connected for up to 60 s)",
    ),
    ("Client error '413", "a message is larger than the coordinator's proxy lets through (deploy/fleet-proxy.cfg)"),
    ("Server error '5", "the coordinator failed at a call; what at, is in its superlink.log"),
    (
        OUT_OF_STEP.pattern,
        "a run was stopped while a message of it was on its way; this node would be late from now on",
    ),
    # Flower ends with code 0 and without a word when a signature is refused, at first or after it has got its number.
    (
        "SuperNode ID.*terminated gracefully",
        "the coordinator no longer accepts this silo's signature: a clock was set, or the coordinator has lost its "
        "database and has to register the keys again",
    ),
    (
        "terminated gracefully",
        "the coordinator does not accept this silo's signature: set the clocks, for this one may be at most 5 s ahead "
        "of the coordinator's, or 305 s behind",
    ),
)
# A killed node's key is refused for up to 60 s, so giving up earlier would turn a crash into an outage.
PATIENCE_SECONDS = 180.0


def start_silo(config: SiloConfig, processes: Processes) -> Keeper:
    """Start a silo's processes; ``Keeper.look`` keeps them running.

    Raises:
        ProcessFailed: the safety service did not start.
        OSError: the state folder cannot be written to.
    """
    safety_url = config.safety_url
    if config.safety_port is not None:
        safety = Service("safety", "services.safety", config.safety_port)
        processes.start_services([safety])
        safety_url = safety.url
    node_config = config.state_dir / "node-config.toml"
    _write_node_config(node_config, config, safety_url)
    keeper = Keeper(processes)
    keeper.keep(
        "supernode", supernode(config, node_config), patience_seconds=PATIENCE_SECONDS, explain=explain,
        stuck=has_to_start_again,
    )  # fmt: skip
    keeper.keep("superexec", superexec(config))
    return keeper


def supernode(config: SiloConfig, node_config: Path) -> list[str]:
    """The command that connects this silo."""
    return flower(
        "flower-supernode", config.state_dir / "supernode",
        "--superlink", config.superlink, "--root-certificates", config.authority,
        "--auth-supernode-private-key", config.private_key, "--trusted-entities", config.trusted_entities,
        "--isolation", "process", "--superexec-auth-secret-file", config.task_secret,
        "--host", "127.0.0.1", "--port", config.runtime_port, "--node-config", node_config,
    )  # fmt: skip


def superexec(config: SiloConfig) -> list[str]:
    """The command that starts a ClientApp for each message; within the silo's own machine, so without TLS."""
    return flower(
        "flower-superexec", config.state_dir / "superexec",
        "--runtime-api-address", f"127.0.0.1:{config.runtime_port}", "--insecure",
        "--superexec-auth-secret-file", config.task_secret,
    )  # fmt: skip


def explain(output: str) -> str:
    """What is wrong with a SuperNode, from what it wrote; of several reasons the first is the closest."""
    return first_reason(REASONS, output)


def has_to_start_again(output: str) -> bool:
    """Whether a SuperNode has met what ends its work, or spoils it.

    Flower 1.41 tries again after most errors. After a TLS error, or an answer that is neither success nor 502 to 504,
    it signs off, but its process stays because its own API's thread does. When a run is stopped while a message of it
    is on the way, a task without a message is left. The error that comes of it minutes later is sent in place of the
    reply to another message, and that reply only after the next message: the node is one reply behind from then on.
    """
    return any(sign.search(output) for sign in (GIVEN_UP, OUT_OF_STEP))


def _write_node_config(path: Path, config: SiloConfig, safety_url: str) -> None:
    """What this silo decides for itself; the coordinator's values for these keys do not count."""
    values: dict[str, Value] = {
        "partition-id": config.number,
        "shard-data": str(config.shard.resolve()),
        "client-dir": str((config.state_dir / "curated").resolve()),
        "safety-url": safety_url,
        "critique-url": config.critique_url,
    }
    write_toml(path, values)
