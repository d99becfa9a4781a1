"""``python -m services.inference``: serve a model, release adapters, or measure the speed."""

import importlib
import sys
from collections.abc import Sequence

from services.common.app import serve
from services.common.settings import exit_with, load_settings
from services.contracts.errors import FedwardError
from services.inference.settings import InferenceSettings

SUMMARY = """Generate answers with a language model and its adapters, over OpenAI's and TGI's protocols.

examples:
  python -m services.inference                                       the shipped miniature on port 8103
  python -m services.inference --adapters-dir runs/demo/adapters     load adapters only from that folder
  python -m services.inference --release runs/demo/adapters/r3       serve this adapter from the start
  python -m services.inference --model org/name --dtype bfloat16     a model of the Hugging Face Hub

other commands, each with its own --help:
  python -m services.inference release   load adapters and choose which one answers, on this service, vLLM or TGI
  python -m services.inference bench     speed against one-at-a-time generation
"""
COMMANDS = {"release": "services.inference.release", "bench": "services.inference.bench"}


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` names; without one, load the model and serve until told to stop."""
    try:
        if argv and argv[0] in COMMANDS:
            # Imported late, as below: a release needs no torch.
            code: int = importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
            return code
        settings = load_settings(InferenceSettings, "python -m services.inference", SUMMARY, argv)
        # Imported late: --help and a bad flag answer at once, without loading torch.
        from services.inference.app import build_app
        from services.inference.model import load_base
        from services.inference.service import InferenceService

        service = InferenceService(load_base(settings), settings)
        if settings.release:
            service.load_release(settings.release)
        service.warm_up()
        serve(build_app(service), settings, "inference")
    except FedwardError as error:
        return exit_with(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
