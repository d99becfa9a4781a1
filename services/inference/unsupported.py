"""Fields that this service does not act on: refused by name, unless their value asks for nothing.

A field that is accepted and ignored makes an answer look like what was asked for. So beyond bookkeeping, which says
nothing to a model, a field that is not known may only be empty or have the value that stands for "as usual".
"""

from collections.abc import Mapping
from typing import Any

from services.contracts.errors import RequestError

# For a server's own records. ``stream_options`` is read where streams are made.
BOOKKEEPING = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "stream_options",
    }
)  # fmt: skip
# Values beside null, 0, false and the empty ones that ask for nothing.
AS_USUAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),  # without tools, which are refused
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "best_of": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (-1,),
    "typical_p": (1,),
}
# Here false asks for something: true is as usual.
ON = frozenset({"add_generation_prompt", "skip_special_tokens", "spaces_between_special_tokens"})


def refuse_unsupported(fields: Mapping[str, Any] | None, place: str = "") -> None:
    """Raise RequestError for the first field whose value would be ignored.

    Args:
        fields: names and values that the request's schema does not know.
        place: where they stand, for example ``messages.0.``.
    """
    for name, value in (fields or {}).items():
        if name in BOOKKEEPING or value is None:
            continue
        asks_nothing = value is True if name in ON else not value or value in AS_USUAL.get(name, ())
        if not asks_nothing:
            # A name comes from outside: cut short, and without halves of characters, which an answer cannot hold.
            where = f"{place}{name[:100]}".encode(errors="replace").decode()
            raise RequestError(f"{where} is not supported by this service; leave it out", param=where)
