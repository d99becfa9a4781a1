"""Turning conversations into token ids, so that what a user types can never become a special token.

A chat template writes markers such as ``<|assistant|>`` around the messages. Someone who types such a marker could
otherwise end their own turn and begin the model's. The rule here: the special tokens of a prompt are exactly those
that the template wrote. This module takes any transformers tokenizer and imports no torch.
"""

import re
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateError

from services.contracts.chat import ChatMessage
from services.contracts.errors import RequestError

# A private-use character stands where a message's text goes; no template trims or escapes it.
_MARK = "\ue000"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKED = re.compile(f"{_MARK}(\\d+){_MARK}")


class PromptEncoder:
    """Encodes chats and raw texts with one transformers tokenizer; safe to call from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = frozenset(special)
        self._special_texts = tuple(special.values())
        self._longest_token = max(len(token) for token in tokenizer.get_vocab())
        self._lock = threading.Lock()

    def fewest_tokens(self, texts: Iterable[str]) -> int:
        """A lower bound of the tokens of texts, had without encoding them: encoding megabytes takes seconds."""
        return sum(len(text) for text in texts) // self._longest_token

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of the rendered conversation, up to where the assistant's answer begins.

        The rendered text is tokenised as a whole, as in training. Only when that yields other special tokens than
        the template's own, the messages are tokenised apart from the template, with markers as plain text.

        Raises:
            RequestError: the tokenizer has no chat template, or the template refuses these messages.
        """
        # "developer" is OpenAI's newer word for "system"; templates know the older one.
        roles = ["system" if message.role == "developer" else message.role for message in messages]
        turns = [{"role": role, "content": m.content or ""} for role, m in zip(roles, messages, strict=True)]
        marked = [{"role": role, "content": f"{_MARK}{i}{_MARK}"} for i, role in enumerate(roles)]
        pieces = _MARKED.split(self._render(marked))  # template, index, template, index, ..., template
        parts = [self._encode(text) for text in pieces[::2]]
        ids = self._encode(self._render(turns))
        if self._special(ids) == [i for part in parts for i in self._special(part)]:
            return ids
        contents = [self._encode(turns[int(index)]["content"], plain=True) for index in pieces[1::2]]
        return [i for part, content in zip(parts, [*contents, []], strict=True) for i in (*part, *content)]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a raw prompt, as TGI's ``/generate`` takes it.

        A text that begins with a special token is a conversation that the caller has rendered: its markers count.
        In any other text they are plain text, and the tokenizer adds its own beginning, if it has one.
        """
        if text.startswith(self._special_texts):
            return self._encode(text)
        return self._encode(text, plain=True, beginning=True)

    def _render(self, turns: list[dict[str, str]]) -> str:
        if not self._tokenizer.chat_template:
            raise RequestError("the model has no chat template; send a rendered prompt to /generate", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise RequestError(
                f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from error
        return str(text)

    def _encode(self, text: str, *, plain: bool = False, beginning: bool = False) -> list[int]:
        if _LONE_SURROGATE.search(text):
            raise RequestError("the prompt is not valid Unicode: it holds one half of a surrogate pair")
        # The tokenizer keeps split_special_tokens as state between its own calls, hence the lock.
        with self._lock:
            ids = self._tokenizer(text, add_special_tokens=beginning, split_special_tokens=plain)["input_ids"]
        return list(ids)

    def _special(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._special_ids]
