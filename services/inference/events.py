"""Server-sent events as OpenAI and TGI write them: one line of JSON each."""

import json

from services.contracts.chat import Json

DONE = "data: [DONE]\n\n"


def event(content: Json) -> str:
    """One event with ``content`` as its data."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
