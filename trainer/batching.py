"""From prompt-response pairs to padded batches with labels on the answer tokens only."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from services.common.chat_prompts import PromptEncoder
from services.contracts.chat import ChatMessage
from trainer.shards import Pair

IGNORED = -100  # the label that torch's cross-entropy leaves out
BUCKET_BATCHES = 8


@dataclass(frozen=True)
class Example:
    """One tokenised pair: all its tokens, and how many of the first are the prompt (no loss on those)."""

    token_ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        """How many tokens carry loss; at least 1."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True)
class Dataset:
    """Tokenised pairs, and how many were left out because their prompt filled the whole length."""

    examples: tuple[Example, ...]
    skipped: int

    @property
    def answer_tokens(self) -> int:
        """How many tokens carry loss in one pass."""
        return sum(example.answer_length for example in self.examples)


def encode_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenise pairs by the model's chat template."""
    prompts = PromptEncoder(tokenizer)
    encoded = [encode_pair(pair, prompts, tokenizer, max_length) for pair in pairs]
    examples = tuple(example for example in encoded if example is not None)
    return Dataset(examples, skipped=len(encoded) - len(examples))


def encode_pair(
    pair: Pair, prompts: PromptEncoder, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example | None:
    """Tokenise one pair; an answer that is too long is cut at its end.

    The prompt is encoded as the inference service encodes it, then come the answer and the end-of-sequence token.
    Control tokens in the pair's own text become ordinary text, so that a pair cannot end its own turn.

    Returns:
        None when the prompt alone reaches ``max_length``: an example without answer tokens would have loss NaN.
    """
    prompt = prompts.encode_chat([ChatMessage(role="user", content=pair.prompt)])
    if len(prompt) >= max_length:
        return None
    answer = tokenizer(pair.response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    token_ids = (*prompt, *answer, tokenizer.eos_token_id)
    return Example(token_ids[:max_length], len(prompt))


def collate(examples: Sequence[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right.

    No attention mask is needed: under causal attention no token sees the padding that comes after it.

    Returns:
        Input ids and labels, each of shape (batch, longest example).
    """
    longest = max(len(example.token_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.token_ids)
        input_ids[row, : len(ids)] = ids
        labels[row, example.prompt_length : len(ids)] = ids[example.prompt_length :]
    return input_ids, labels


def batches_for_ever(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Pass over the examples again and again, each time in a new order, in batches of similar length.

    Sorting by length within a few batches' worth of shuffled examples saves most padding and keeps batches mixed.
    """
    order = random.Random(seed)
    while True:
        shuffled = list(examples)
        order.shuffle(shuffled)
        batches = []
        for start in range(0, len(shuffled), BUCKET_BATCHES * batch_size):
            bucket = sorted(shuffled[start : start + BUCKET_BATCHES * batch_size], key=lambda e: len(e.token_ids))
            batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        order.shuffle(batches)
        yield from batches
