"""``python -m gateway``: serve the gateway, or look after its policy, its API keys and its audit.

Every command but ``serve`` imports its module only when it is asked for.
"""

import importlib
import sys
from collections.abc import Sequence

from gateway.app import build_app
from gateway.settings import GatewaySettings
from services.common.app import serve
from services.common.settings import exit_with, load_settings
from services.contracts.errors import FedwardError

SUMMARY = """Serve the gateway: chat completions with every prompt and every answer checked.

It needs an inference service and a safety service. Without a verdict it answers 503, never an unchecked text.

examples:
  python -m gateway --port 8080 --inference-url http://127.0.0.1:8103 --safety-url http://127.0.0.1:8101
  FEDWARD_GATEWAY_CHECK_DEADLINE_MS=500 python -m gateway
  curl http://127.0.0.1:8080/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"model": "fedward", "messages": [{"role": "user", "content": "Name three rivers."}], "stream": true}'

other commands, each with its own --help:
  python -m gateway policy check    check a policy file, and print what is in force
  python -m gateway keys create     make an API key for a tenant; list and revoke them
  python -m gateway audit verify    find out whether audit records were changed; export them
"""
COMMANDS = {"policy": "gateway.policy_check", "keys": "gateway.keys_command", "audit": "gateway.audit_verify"}


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` names; ``serve`` when it names none. Returns the exit code."""
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in ("serve", *COMMANDS) else ("serve", argv)
    try:
        if command != "serve":
            code: int = importlib.import_module(COMMANDS[command]).main(rest)
            return code
        settings = load_settings(GatewaySettings, "python -m gateway", SUMMARY, rest)
        serve(build_app(settings), settings, "gateway")
    except FedwardError as error:
        return exit_with(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
