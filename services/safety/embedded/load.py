"""Finding and loading the embedded classifier: which tier runs, and at which operating point."""

import importlib.util
import os
from pathlib import Path
from typing import Literal

from services.common.logs import get_logger
from services.contracts.errors import ConfigError
from services.safety.calibration import PointName, read_calibration
from services.safety.embedded.classifier import EmbeddedClassifier
from services.safety.embedded.ngram import load_ngram
from services.safety.embedded.scores import Scorer
from services.safety.embedded.weights import SHIPPED, read_weights

Tier = Literal["auto", "encoder", "ngram"]
CALIBRATION = "calibration.json"
BUILT = "built.json"  # written last: a folder with it is complete


def load_classifier(
    tier: Tier = "auto",
    *,
    weights: Path = SHIPPED,
    encoder: Path | None = None,
    calibration: Path | None = None,
    point: PointName = "balanced",
) -> EmbeddedClassifier:
    """The classifier that a process serves.

    Args:
        tier: ``auto`` takes the encoder where it has been built, else the n-gram model, and says so in the log.
        weights: the folder with the tiers' weights and calibrations.
        encoder: the folder of the built encoder; ``default_folder`` of the weights when it is None.
        calibration: a calibration file in place of the shipped one.
        point: the operating point.

    Raises:
        ConfigError: the tier that was asked for is not there, or a file is missing, malformed or of another model.
    """
    name, scorer = _load_tier(tier, weights, encoder)
    path = calibration or weights / name / CALIBRATION
    return EmbeddedClassifier(scorer, read_calibration(path, scorer.model_id, scorer.sha256), point)


def default_folder(adapter_sha256: str) -> Path:
    """Where an adapter's built encoder lies: one folder per adapter under the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fedward" / f"safety-{adapter_sha256[:16]}"


def _load_tier(tier: Tier, weights: Path, encoder: Path | None) -> tuple[str, Scorer]:
    if tier == "ngram":
        return "ngram", load_ngram(weights / "ngram")
    adapter = read_weights(weights / "encoder").manifest.sha256
    folder = encoder or default_folder(adapter)
    reason = _why_not(folder)
    if reason is None:
        from services.safety.embedded.encoder import load_encoder

        return "encoder", load_encoder(folder, adapter)
    if tier == "encoder":
        raise ConfigError(f"the encoder tier cannot run: {reason}")
    get_logger().warning("THE WEAKER N-GRAM TIER RUNS in place of the encoder", reason=reason)
    return "ngram", load_ngram(weights / "ngram")


def _why_not(folder: Path) -> str | None:
    """Why the encoder tier is not there; a built one that is damaged is an error and no reason to run another."""
    missing = [name for name in ("onnxruntime", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed; pip install 'fedward[safety]'"
    if not (folder / BUILT).is_file():
        return f"it is not built in {folder}; run `python -m services.safety build`"
    return None
