"""Network namespaces: the coordinator and each silo as if on machines of their own, on one machine.

The coordinator's namespace has one cable to each silo and no other. A silo therefore reaches the coordinator's address
and nothing else: no other silo, not this machine's services, not the internet.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "fedward"
NETWORK = "10.78"  # within the namespaces only: nothing of this machine is routed there
NAMESPACES = Path("/run/netns")


@dataclass(frozen=True)
class Network:
    """Where the parties of a federation run. Without namespaces they share this machine's loopback."""

    coordinator: str | None = None
    silos: tuple[str | None, ...] = ()
    addresses: tuple[str, ...] = field(default=())

    @property
    def separated(self) -> bool:
        """Whether each party has a network of its own."""
        return self.coordinator is not None

    def hosts(self) -> tuple[str, ...]:
        """All addresses of the coordinator that its certificate has to name."""
        return ("localhost", "127.0.0.1", *dict.fromkeys(self.addresses))


def inside(namespace: str | None, argv: Sequence[str]) -> list[str]:
    """The command that runs ``argv`` in a namespace; None is where we are."""
    return [*(("ip", "netns", "exec", namespace) if namespace else ()), *argv]


@contextmanager
def network(silos: int, *, separated: bool) -> Iterator[Network]:
    """Namespaces for a coordinator and its silos, for as long as the block lasts.

    Args:
        silos: how many; at most 250.
        separated: False for all parties on this machine's loopback.

    Raises:
        CalledProcessError: a namespace could not be made; ``may_separate`` tells beforehand.
    """
    if not separated:
        yield Network(silos=(None,) * silos, addresses=("127.0.0.1",) * silos)
        return
    _remove_orphans()
    made = Network(
        coordinator=f"{PREFIX}-{os.getpid()}-coordinator",
        silos=tuple(f"{PREFIX}-{os.getpid()}-silo-{number}" for number in range(silos)),
        addresses=tuple(f"{NETWORK}.{number}.1" for number in range(silos)),
    )
    try:
        _lay_cables(made)
        yield made
    finally:
        for name in (made.coordinator, *made.silos):
            _ip("netns", "delete", str(name), check=False)


def may_separate() -> str | None:
    """Why namespaces cannot be made here; None when they can."""
    if shutil.which("ip") is None:
        return "the command `ip` is missing (Debian's iproute2)"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
    except subprocess.CalledProcessError as error:
        return f"`ip netns add` was refused: {error.stderr.strip() or error}"
    _ip("netns", "delete", probe)
    return None


def _lay_cables(made: Network) -> None:
    coordinator = str(made.coordinator)
    for name in (coordinator, *made.silos):
        _ip("netns", "add", str(name))
        _ip("-n", str(name), "link", "set", "lo", "up")
    no_forwarding = "echo 0 > /proc/sys/net/ipv4/ip_forward"  # a new namespace takes this machine's setting
    subprocess.run(inside(coordinator, ["sh", "-c", no_forwarding]), check=True, capture_output=True)
    for number, (silo, address) in enumerate(zip(made.silos, made.addresses, strict=True)):
        cable = f"silo{number}"
        _ip("-n", coordinator, "link", "add", cable, "type", "veth", "peer", "name", "uplink", "netns", str(silo))
        _ip("-n", coordinator, "address", "add", f"{address}/30", "dev", cable)
        _ip("-n", coordinator, "link", "set", cable, "up")
        _ip("-n", str(silo), "address", "add", f"{NETWORK}.{number}.2/30", "dev", "uplink")
        _ip("-n", str(silo), "link", "set", "uplink", "up")


def _remove_orphans() -> None:
    """Remove the namespaces of an earlier command that was killed; their names hold its process id."""
    for path in NAMESPACES.glob(f"{PREFIX}-*"):
        owner = path.name.split("-")[1]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            _ip("netns", "delete", path.name, check=False)


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)
