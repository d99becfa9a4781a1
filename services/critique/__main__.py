"""Start the critique service."""

import sys

from services.common.app import serve
from services.common.settings import exit_with, load_settings
from services.contracts.constitution import load_constitution
from services.contracts.errors import FedwardError
from services.critique.app import build_app
from services.critique.backend import load_model
from services.critique.settings import CritiqueSettings

SUMMARY = """Critique drafts, revise them and compare answers, under a constitution.

examples:
  python -m services.critique                                        the shipped miniature and constitution, port 8102
  python -m services.critique --constitution my-principles.toml      your own principles
  python -m services.critique --backend openai --upstream-url http://localhost:8080 --model org/instruct-model
"""


def main() -> int:
    """Read the constitution, load the model, then serve until told to stop; the answer is the exit code."""
    try:
        settings = load_settings(CritiqueSettings, "python -m services.critique", SUMMARY)
        constitution = load_constitution(settings.constitution)
        serve(build_app(settings, constitution, load_model(settings)), settings, "critique")
    except FedwardError as error:
        return exit_with(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
