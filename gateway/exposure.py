"""What must hold before the gateway listens where others can reach it. Nothing that serves as a secret is built in."""

import ipaddress
from pathlib import Path

from services.contracts.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own. A name is not, except ``localhost``: it may resolve to anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_safe_start(host: str, *, auth: str, insecure_no_auth: bool, audit_key_file: Path | None) -> None:
    """Refuse to start without identification or without the operator's audit key where others can connect.

    Args:
        host: the address that the gateway is to listen on.
        auth: ``none`` or a way to identify callers.
        insecure_no_auth: the operator's word that nobody needs to be identified.
        audit_key_file: the key of the prompts' hashes in the audit.

    Raises:
        ConfigError: naming the setting that is missing.
    """
    if is_loopback(host):
        return
    if auth == "none" and not insecure_no_auth:
        raise ConfigError(
            f"--host {host} can be reached by others, and --auth is none: choose --auth keys or jwt, "
            "or say --insecure-no-auth true when something in front of the gateway identifies the callers",
            param="auth",
        )
    if audit_key_file is None:
        raise ConfigError(
            f"--host {host} can be reached by others: give --audit-key-file, a file of at least 32 "
            "random bytes (for example: head -c 32 /dev/urandom > audit.key)",
            param="audit_key_file",
        )
