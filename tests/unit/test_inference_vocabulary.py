"""Single tokens as text and bytes, in byte-level vocabularies and in SentencePiece's."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.inference.text import Detokenizer
from services.inference.vocabulary import Vocabulary, finite
from tests.fakes.tiny_model import build_tokenizer

SENTENCEPIECE = ["<unk>", "<s>", "▁", "a", "▁bread", "bread", "<0xE6>", "<0x9D>", "<0xB1>", "▁a"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """A vocabulary as Llama 2 has it: spaces are part of tokens, a text's first one is dropped, bytes fall back."""
    vocab = {token: i for i, token in enumerate(SENTENCEPIECE)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("text", ["bread and Grüße", "東京 🙂", "naïve"])
def test_bytes_of_all_tokens_are_the_text(text: str) -> None:
    tokenizer = build_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    content = [vocabulary.content(i) or [] for i in ids]
    assert bytes(byte for part in content for byte in part).decode() == text


def test_part_of_a_character_is_named_by_its_bytes() -> None:
    tokenizer = build_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    first = tokenizer("\U00010348", add_special_tokens=False)["input_ids"][0]
    assert vocabulary.name(first) == "bytes:\\xf0"
    assert vocabulary.content(first) == [0xF0]


def test_special_token_is_known_by_its_text() -> None:
    vocabulary = Vocabulary(build_tokenizer())
    assert (vocabulary.special(3), vocabulary.name(3)) == ("<|user|>", "<|user|>")
    assert vocabulary.special(70) is None


def test_sentencepiece_tokens_keep_their_space_and_bytes() -> None:
    vocabulary = Vocabulary(sentencepiece())
    assert vocabulary.name(SENTENCEPIECE.index("▁bread")) == " bread"
    assert vocabulary.name(SENTENCEPIECE.index("bread")) == "bread"
    assert vocabulary.name(SENTENCEPIECE.index("<0xE6>")) == "bytes:\\xe6"
    assert vocabulary.content(SENTENCEPIECE.index("<0x9D>")) == [0x9D]


def test_continuation_keeps_the_space_that_its_first_token_begins_with() -> None:
    tokenizer = sentencepiece()

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    bread, a = SENTENCEPIECE.index("▁bread"), SENTENCEPIECE.index("▁a")
    assert Detokenizer(decode, [a] * 9).add(bread) == " bread"
    assert Detokenizer(decode).add(bread) == "bread"


def test_impossible_token_has_a_number_that_json_can_hold() -> None:
    assert finite(float("-inf")) == -9999.0
    assert finite(-1.5) == -1.5
