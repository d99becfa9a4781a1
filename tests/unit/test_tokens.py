"""Tokenised shards in files: the same tokens as without them, and no others than this shard's."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from services.contracts.errors import ConfigError
from tests.fakes.tiny_model import build_tokenizer
from trainer import tokens
from trainer.batching import Dataset, encode_pairs
from trainer.shards import Pair
from trainer.tokens import encode_once

PAIRS = (
    Pair(prompt="Who are you?", response="An assistant.", harmful=False),
    Pair(prompt="word " * 200, response="Too long a question."),
    Pair(prompt="東京?", response="Grüße 🙂"),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def files(folder: Path) -> list[Path]:
    return list(folder.glob("tokens-*"))


def test_shard_is_tokenised_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode_once(tmp_path, PAIRS, tokenizer, 64)
    assert first == encode_pairs(PAIRS, tokenizer, 64)
    assert (len(first.examples), first.skipped) == (2, 1)
    (file,) = files(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600  # it holds the client's text
    monkeypatch.setattr(tokens, "encode_pairs", lambda *_: pytest.fail("tokenised again"))
    assert encode_once(tmp_path, PAIRS, tokenizer, 64) == first


def test_everything_that_tokens_depend_on_makes_another_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    other_template = build_tokenizer()
    other_template.chat_template = "{{ messages[0].content }}:"
    other_vocabulary = build_tokenizer()
    other_vocabulary.add_tokens(["assistant"])
    for pairs, by, length in (
        (PAIRS, tokenizer, 64),
        (PAIRS[::-1], tokenizer, 64),
        (PAIRS, tokenizer, 16),
        (PAIRS, other_template, 16),
        (PAIRS, other_vocabulary, 16),
    ):
        before = files(tmp_path)
        assert encode_once(tmp_path, pairs, by, length) == encode_pairs(pairs, by, length)
        (after,) = files(tmp_path)  # and the former shard's is gone
        assert after not in before


def test_label_does_not_matter(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    encode_once(tmp_path, PAIRS, tokenizer, 64)
    before = files(tmp_path)
    encode_once(tmp_path, [pair.model_copy(update={"harmful": True}) for pair in PAIRS], tokenizer, 64)
    assert files(tmp_path) == before


def test_damaged_file_is_written_anew(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_once(tmp_path, PAIRS, tokenizer, 64)
    (file,) = files(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    assert encode_once(tmp_path, PAIRS, tokenizer, 64) == whole
    assert file.read_bytes() == content


def test_shard_of_which_nothing_is_left(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for _ in range(2):
        assert encode_once(tmp_path, PAIRS[1:2], tokenizer, 64) == Dataset((), skipped=1)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to .*file/client/tokens-"):
        encode_once(tmp_path / "file" / "client", PAIRS, tokenizer, 64)
