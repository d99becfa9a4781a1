"""JSON logs on stderr, one object a line, without prompt text.

Callers log names, counts and ids; no log call takes a request's text. Exceptions are logged as their types and
places without their messages, since a library's message may quote what it was given (pydantic's does).
"""

import logging
import sys
import traceback

import structlog
from structlog.typing import ExcInfo, Processor


def configure_logs(level: str, service: str) -> None:
    """Send structlog's and the standard library's logs through one JSON renderer.

    Args:
        level: the least severe level that is written.
        service: the name put in every line.
    """
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    exceptions = structlog.processors.ExceptionRenderer(_types_and_places)
    shared: list[Processor] = [structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, stamp]
    structlog.configure(
        processors=[*shared, exceptions, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(service=service)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            exceptions,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore"):  # a line and more for each call; the metrics count them
        logging.getLogger(chatty).setLevel("WARNING")


def get_logger() -> structlog.stdlib.BoundLogger:
    """The process's logger; use keyword arguments for values: ``log.info("adapter loaded", sha256=...)``."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger


def _types_and_places(exc_info: ExcInfo) -> str:
    """An exception and what led to it, each with the source lines it came through."""
    parts: list[str] = []
    error: BaseException | None = exc_info[1]
    while error is not None:
        parts += [f"{type(error).__module__}.{type(error).__qualname__}\n", *traceback.format_tb(error.__traceback__)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join(parts)
