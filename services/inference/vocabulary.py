"""What single tokens are as text and as bytes, for the log-probabilities that OpenAI's protocol reports."""

import re
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from services.inference.text import INCOMPLETE

# How vocabularies write the bytes of a part of a character: SentencePiece, and byte-level BPE.
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_BYTE_OF = {str(written): int(byte) for byte, written in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
LOWEST = -9999.0  # stands for minus infinity, which JSON does not have; vLLM writes the same


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(logprob, LOWEST)


class Vocabulary:
    """The tokens of one transformers tokenizer; safe to call from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # Tokenizers may drop a space at the beginning of a text, so a token is decoded behind another one.
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._decode_one = lru_cache(maxsize=65_536)(self._decode_one_uncached)

    def special(self, token_id: int) -> str | None:
        """The text of a special token, which is no text to a reader; None for every other token."""
        return self._special.get(token_id)

    def name(self, token_id: int) -> str:
        """The token as OpenAI writes it: its text, or ``bytes:\\xe6\\x9d`` for a part of a character."""
        text, content = self._decode_one(token_id)
        if INCOMPLETE in text and content is not None:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
        return text

    def content(self, token_id: int) -> list[int] | None:
        """The token's bytes; None where the vocabulary does not tell those of a part of a character."""
        content = self._decode_one(token_id)[1]
        return None if content is None else list(content)

    def _decode_one_uncached(self, token_id: int) -> tuple[str, bytes | None]:
        if token_id in self._special:
            return self._special[token_id], self._special[token_id].encode()
        known = self._decode(self._before)
        text = self._decode([*self._before, token_id])[len(known) :]
        if INCOMPLETE not in text:
            return text, text.encode()
        written = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if match := _BYTE.fullmatch(written):
            return text, bytes([int(match[1], 16)])
        if all(character in _BYTE_OF for character in written):
            return text, bytes(_BYTE_OF[character] for character in written)
        return text, None

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
