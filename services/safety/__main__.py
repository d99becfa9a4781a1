"""``python -m services.safety``: serve the classifier, or build, calibrate, tune, train or measure it.

Every command but ``serve`` imports its libraries only when it is asked for, so that serving needs few.
"""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from services.common.app import serve
from services.common.settings import exit_with, load_settings
from services.contracts.errors import ConfigError, FedwardError
from services.safety.app import build_app
from services.safety.assemble import build_backend
from services.safety.settings import SafetySettings

SUMMARY = """\
Classify prompts, responses and conversations for harm, over HTTP.

examples:
  python -m services.safety --port 8101
  python -m services.safety --operating-point strict --tier encoder --threads 4
  python -m services.safety --backend guard --guard-family llama-guard \\
    --guard-url http://vllm:8000 --guard-model meta-llama/Llama-Guard-3-8B
  python -m services.safety --backend cascade --band '[0.1, 0.9]' --guard-family qwen3guard \\
    --guard-url http://vllm:8000 --guard-model Qwen/Qwen3Guard-Gen-0.6B

other commands, each with its own --help:
  python -m services.safety build       make the encoder tier's file (once, needs no torch)
  python -m services.safety calibrate   choose the thresholds on your own labelled data
  python -m services.safety band        choose a cascade's uncertain band on your own labelled data
  python -m services.safety tune        fine-tune the encoder on your own labelled data
  python -m services.safety measure     print the measured quality
  python -m services.safety refusals    refusal detection, each model's answers left out once
  python -m services.safety train       reproduce the shipped weights
  python -m services.safety bench       speed against a plain transformers pipeline

  curl -s localhost:8101/v1/classify -H 'content-type: application/json' \\
    -d '{"items": [{"prompt": "How do I bake bread?"}]}'
"""
COMMANDS = {
    "build": "services.safety.embedded.encoder_build",
    "calibrate": "services.safety.training.calibrate",
    "band": "services.safety.training.band",
    "tune": "services.safety.training.tune",
    "measure": "services.safety.training.measure",
    "train": "services.safety.training.train",
    "bench": "services.safety.training.bench",
    "refusals": "services.safety.training.leave_one_out",
}

# The extra that has a command's libraries.
EXTRA = {name: "safety-build" if name == "build" else "train-safety" for name in COMMANDS}


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` names; ``serve`` when it names none."""
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in ("serve", *COMMANDS) else ("serve", argv)
    try:
        if command != "serve":
            code: int = _command(command).main(rest)
            return code
        settings = load_settings(SafetySettings, "python -m services.safety", SUMMARY, rest)
        serve(build_app(settings, build_backend(settings)), settings, "safety")
    except FedwardError as error:
        return exit_with(error)
    return 0


def _command(name: str) -> ModuleType:
    """The module of a command; raises ConfigError when a library that only it needs is not installed."""
    try:
        return importlib.import_module(COMMANDS[name])
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{name} needs {error.name}, which is not installed: pip install 'fedward[{EXTRA[name]}]'"
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
