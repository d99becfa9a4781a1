"""JSON logs on stderr, one object a line, without prompt text.

Callers log names, counts and ids. Nothing here can tell a prompt from a name, so the rule stands in the code
review and in ``tests/meta``: no log call takes a request's text.
"""

import logging
import sys

import structlog
from structlog.typing import Processor


def configure_logs(level: str, service: str) -> None:
    """Send structlog's and the standard library's logs through one JSON renderer.

    Args:
        level: the least severe level that is written.
        service: the name put in every line.
    """
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    shared: list[Processor] = [structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, stamp]
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(service=service)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())


def get_logger() -> structlog.stdlib.BoundLogger:
    """The process's logger; use keyword arguments for values: ``log.info("adapter loaded", sha256=...)``."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger
