"""``python -m services.safety``: serve the classifier, train it, or measure it.

Training and measuring import their libraries only when asked for, so that serving needs NumPy alone.
"""

import sys
from collections.abc import Sequence

from services.common.app import serve
from services.common.settings import exit_with, load_settings
from services.contracts.errors import FedwardError
from services.safety.app import build_app
from services.safety.classifier import load_model
from services.safety.settings import SafetySettings

SUMMARY = """\
Classify prompts, responses and conversations for harm, over HTTP.

examples:
  python -m services.safety --port 8101
  FEDWARD_SAFETY_MAX_ITEMS=64 python -m services.safety serve
  python -m services.safety train --data $FEDWARD_DATA --out services/safety/weights
  python -m services.safety measure --data $FEDWARD_DATA --out safety.json

  curl -s localhost:8101/v1/classify -H 'content-type: application/json' \\
    -d '{"items": [{"prompt": "How do I bake bread?"}]}'
"""


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` names; ``serve`` when it names none."""
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in ("serve", "train", "measure") else ("serve", argv)
    try:
        if command == "train":
            from services.safety.training import train

            return train.main(rest)
        if command == "measure":
            from services.safety.training import measure

            return measure.main(rest)
        settings = load_settings(SafetySettings, "python -m services.safety", SUMMARY, rest)
        serve(build_app(settings, load_model(settings.weights)), settings, "safety")
    except FedwardError as error:
        return exit_with(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
