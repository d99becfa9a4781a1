"""Start the inference service."""

import sys

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
"""


def main() -> int:
    """Load the model, then serve until told to stop; the answer is the exit code."""
    try:
        settings = load_settings(InferenceSettings, "python -m services.inference", SUMMARY)
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
    sys.exit(main())
