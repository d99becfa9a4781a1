"""What is to be classified, in one form."""

import re
from typing import NamedTuple

from services.contracts.chat import ChatMessage
from services.contracts.errors import RequestError
from services.contracts.verdicts import ClassifyItem
from services.safety.embedded.features import normalise, words

# A text without letters or digits is read as harmless only when it is this short (a smiley, a thumbs-up): longer runs
# of symbols can spell something that no embedded model can read.
MAX_SYMBOLS = 16
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class Conversation(NamedTuple):
    """The turns of users and assistants, at least one of them a prompt with text; other roles are left out."""

    turns: list[ChatMessage]

    @property
    def response(self) -> str | None:
        """The assistant's turn that is judged, or None when the last turn is a user's."""
        return _text(self.turns[-1]) if self.turns[-1].role == "assistant" else None

    @property
    def prompts(self) -> list[str]:
        """Every user turn that has text."""
        return [_text(turn) for turn in self.turns if turn.role == "user" and _text(turn).strip()]


def read_item(item: ClassifyItem, name: str = "item") -> Conversation:
    """Bring an item into one form; ``name`` says which one it is in an error message.

    A conversation that ends with an assistant's turn is judged by that turn, with every user turn before it as
    prompt; one that ends with a user's turn is judged by its user turns.

    Raises:
        RequestError: the prompt is blank, or no user turn has any text.
    """
    if item.messages is None:
        prompt = item.prompt or ""
        if not prompt.strip():
            raise RequestError(f"{name}.prompt is empty; there is nothing to classify", param=f"{name}.prompt")
        answer = [] if item.response is None else [ChatMessage(role="assistant", content=item.response)]
        return Conversation([ChatMessage(role="user", content=prompt), *answer])
    conversation = Conversation([turn for turn in item.messages if turn.role in ("user", "assistant")])
    if not conversation.turns or not conversation.prompts:
        raise RequestError(f"{name}.messages has no user turn with text", param=f"{name}.messages")
    return conversation


def why_unreadable(text: str) -> str | None:
    """Why no embedded model can read the text, or None: it has words, or so few symbols that they say nothing."""
    if _HALF_CHARACTER.search(text):
        return "a text that is not valid Unicode: it holds one half of a surrogate pair"
    if words(normalise(text)) or len("".join(text.split())) <= MAX_SYMBOLS:
        return None
    return f"a text of more than {MAX_SYMBOLS} symbols without letters or digits"


def _text(turn: ChatMessage) -> str:
    return turn.content or ""
