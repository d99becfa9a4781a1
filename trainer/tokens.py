"""Tokenised shards in files: a client tokenises its shard once, though each of its rounds may be a new process."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import transformers
from safetensors import SafetensorError
from safetensors.numpy import load, save
from transformers import PreTrainedTokenizerBase

from services.common.files import replace_file
from trainer.batching import Dataset, Example, encode_pairs
from trainer.files import writing
from trainer.shards import Pair

FORMAT = "1"  # another one whenever encode_pairs gives other tokens for the same pairs


def encode_once(folder: Path, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenise a shard, or take the tokens from an earlier round.

    They are kept in ``folder`` under a hash of everything they depend on: pairs, tokenizer, chat template, length,
    versions. They hold client data, so ``folder`` has to be the client's own. Only the latest shard's are kept.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    path = folder / f"tokens-{_key(pairs, tokenizer, max_length)[:32]}.safetensors"
    try:
        return _unpack(path.read_bytes())
    except (OSError, SafetensorError):
        pass  # not tokenised yet, or cut short
    dataset = encode_pairs(pairs, tokenizer, max_length)
    with writing(path):
        replace_file(path, _pack(dataset), mode=0o600)
        for old in set(folder.glob("tokens-*.safetensors")) - {path}:
            old.unlink(missing_ok=True)
    return dataset


def _key(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    marks = (tokenizer.special_tokens_map, tokenizer.chat_template)
    key = hashlib.sha256(repr((FORMAT, transformers.__version__, vocabulary, marks, max_length)).encode())
    for pair in pairs:
        key.update(pair.model_dump_json(include={"prompt", "response"}).encode() + b"\n")
    return key.hexdigest()


def _pack(dataset: Dataset) -> bytes:
    examples = dataset.examples
    return save(
        {
            "token_ids": np.array([token for example in examples for token in example.token_ids], np.int32),
            "lengths": np.array([len(example.token_ids) for example in examples], np.int64),
            "prompt_lengths": np.array([example.prompt_length for example in examples], np.int64),
            "skipped": np.array([dataset.skipped], np.int64),
        }
    )


def _unpack(content: bytes) -> Dataset:
    arrays = load(content)
    ends = np.cumsum(arrays["lengths"]).tolist()
    ids = arrays["token_ids"].tolist()
    prompts = arrays["prompt_lengths"].tolist()
    starts = [0, *ends][:-1]
    examples = (Example(tuple(ids[a:b]), prompt) for a, b, prompt in zip(starts, ends, prompts, strict=True))
    return Dataset(tuple(examples), skipped=int(arrays["skipped"][0]))
