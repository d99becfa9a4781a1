"""The log of a process: one JSON object a line, and no text that came with a request."""

import json
import subprocess
import sys

PROGRAM = """
import logging
from pydantic import BaseModel
from services.common.logs import configure_logs, get_logger

class Body(BaseModel):
    text: int

configure_logs("debug", "test")
log = get_logger()
log.info("adapter loaded", sha256="abc")
try:
    try:
        Body(text="a secret prompt")
    except ValueError as error:
        raise KeyError("a secret prompt") from error
except KeyError as error:
    log.error("unexpected error", exc_info=error)
    logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
logging.getLogger("httpx").info("HTTP Request: GET /")
"""


def test_exceptions_are_logged_by_type_and_place_without_their_messages() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == [
        "adapter loaded",
        "unexpected error",
        "Exception in ASGI application",
    ]
    assert {line["service"] for line in lines} == {"test"}
    assert lines[0]["sha256"] == "abc"
    for line in lines[1:]:
        assert line["exception"].startswith("builtins.KeyError\n")
        assert "pydantic_core._pydantic_core.ValidationError" in line["exception"]
        assert 'File "<string>", line ' in line["exception"]
    assert "secret" not in done.stderr
