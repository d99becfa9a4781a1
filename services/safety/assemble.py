"""The classifier that the settings ask for."""

from services.contracts.errors import ConfigError
from services.safety.backends import Backend, Band, Cascade, EmbeddedBackend, GuardBackend, Limits
from services.safety.calibration import read_calibration
from services.safety.embedded.classifier import EmbeddedClassifier
from services.safety.embedded.load import load_classifier
from services.safety.guard.base import Guard, Thresholds
from services.safety.guard.families import load_family
from services.safety.guard.http import GuardServer, HttpGuard
from services.safety.settings import SafetySettings


def build_backend(settings: SafetySettings) -> Backend:
    """Load what the settings name; raises ConfigError that names what is missing or does not fit."""
    if settings.backend == "embedded":
        return EmbeddedBackend(embedded_classifier(settings), _limits(settings))
    guard = guard_backend(settings)
    if settings.backend == "guard":
        return guard
    first = EmbeddedBackend(embedded_classifier(settings), _limits(settings))
    return Cascade(first, guard, Band(*settings.band))


def embedded_classifier(settings: SafetySettings) -> EmbeddedClassifier:
    """The embedded classifier at its operating point."""
    return load_classifier(
        settings.tier,
        weights=settings.weights,
        encoder=settings.encoder,
        calibration=settings.calibration,
        point=settings.operating_point,
    )


def _limits(settings: SafetySettings) -> Limits:
    return Limits(
        queue_windows=settings.queue_windows,
        batch_tokens=settings.batch_tokens,
        deadline_seconds=settings.deadline_seconds,
        threads=settings.threads,
    )


def guard_backend(settings: SafetySettings) -> GuardBackend:
    """The guard model at the thresholds of its calibration, or at its own where it has none."""
    path = settings.calibration if settings.backend == "guard" else settings.guard_calibration
    guard = _make_guard(settings)
    if path is None:
        return GuardBackend(guard, None, settings.operating_point, _limits(settings))
    calibration = read_calibration(path, guard.model_id, guard.identity)
    point = calibration.points[settings.operating_point]
    guard.thresholds = Thresholds(point.prompt_threshold, point.response_threshold)
    return GuardBackend(guard, calibration, settings.operating_point, _limits(settings))


def _make_guard(settings: SafetySettings) -> Guard:
    assert settings.guard_family
    assert settings.guard_model
    family = load_family(settings.guard_family, settings.guard_template)
    if settings.guard_url:
        server = GuardServer(
            url=settings.guard_url,
            model=settings.guard_model,
            api_key=settings.guard_api_key,
            timeout_seconds=settings.guard_timeout_seconds,
            concurrency=settings.guard_concurrency,
        )
        return HttpGuard(family, server)
    try:
        from services.safety.guard.local import LocalGuard
    except ImportError as error:
        raise ConfigError(
            f"a guard model in this process needs torch and transformers ({error.name} is missing): "
            "pip install 'fedward[models]', or give --guard-url"
        ) from error
    return LocalGuard(family, settings.guard_model, device=settings.guard_device)
