"""Client shards: reading prompt-response pairs, and dealing them to clients by a seed.

Two things are dealt independently. *Placement* says where the harmful pairs go: evenly over all clients (unintended
contamination, as in arXiv 2502.16691) or all of them to as few clients as can hold them (malicious clients).
*Partition* says how unevenly the benign pairs are dealt: at random, or per category by a Dirichlet draw.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.contracts.constitution import describe
from services.contracts.errors import ConfigError, DataError
from trainer.config import RunConfig

Line = TypeVar("Line", bound=BaseModel)
Text = Annotated[str, Field(pattern=r"\S")]  # valid Unicode with at least one visible character


class Pair(BaseModel):
    """One instruction and its answer. ``harmful`` is the label, where one is known; other fields are ignored."""

    model_config = ConfigDict(frozen=True)

    prompt: Text
    response: Text
    harmful: bool | None = None
    category: str | None = None

    def partition_key(self) -> str:
        """What a Dirichlet partition groups by: the category, or the prompt's first word as a stand-in for it."""
        return self.category or self.prompt.split(maxsplit=1)[0].lower()


class Prompt(BaseModel):
    """A line of a file of prompts; a file of pairs serves as well."""

    prompt: Text


def read_jsonl(path: Path, kind: type[Line]) -> list[Line]:
    """Read a file of JSON objects, one a line; blank lines are skipped.

    Raises:
        DataError: the file cannot be read, or ``file:line`` is not a JSON object that fits ``kind``.
    """
    try:
        text = path.read_text("utf-8-sig")  # some editors put a byte order mark before the first line
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path}: cannot be read: {reason}") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(kind.model_validate(json.loads(line)))
        except ValidationError as error:
            raise DataError(f"{path}:{number}: {describe(error)}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON: {getattr(error, 'msg', error)}") from error
    return records


def read_pairs(path: Path, *, harmful: bool | None = None) -> list[Pair]:
    """Read pairs; those without a label get ``harmful``."""
    pairs = read_jsonl(path, Pair)
    return [pair if pair.harmful is not None else pair.model_copy(update={"harmful": harmful}) for pair in pairs]


def client_shard(config: RunConfig, client_id: int) -> list[Pair]:
    """One client's shard: its own file, or its hand of the dealt pairs.

    Raises:
        DataError: the shard is empty, or its data is missing or malformed.
        ConfigError: there is no client of that number.
    """
    if not 0 <= client_id < config.num_clients:
        raise ConfigError(f"client {client_id} is not one of num-clients={config.num_clients}")
    if config.silo_data and config.shard_data is None:
        raise ConfigError("this silo names no data of its own: start its node with shard-data in --node-config")
    if config.shard_data is not None:
        path = Path(config.shard_data.replace("{shard}", str(client_id)))
        pairs = read_pairs(path)
        source = str(path)
    else:
        pairs = deal_shards(config)[client_id]
        source = "the dealt data"
    if not pairs:
        raise DataError(f"shard {client_id} is empty ({source})")
    return pairs


def deal_shards(config: RunConfig) -> list[list[Pair]]:
    """Deal benign and harmful pairs to all clients; the same configuration always gives the same hands.

    Raises:
        DataError: a file is missing, malformed or holds too few pairs.
    """
    harmful_counts = place_harmful(config)
    benign_counts = [config.samples_per_client - count for count in harmful_counts]
    benign = _draw(config.benign_data, sum(benign_counts), f"{config.split_seed}:benign", harmful=False)
    harmful = _draw(config.harmful_data, sum(harmful_counts), f"{config.split_seed}:harmful", harmful=True)
    if config.partition == "dirichlet":
        holders = [client for client, count in enumerate(benign_counts) if count > 0]
        dealt = partition_by_category(benign, len(holders), config.dirichlet_alpha, config.split_seed)
        hands = dict(zip(holders, dealt, strict=True))
        benign_hands = [hands.get(client, []) for client in range(config.num_clients)]
    else:
        benign_hands = _cut(benign, benign_counts)
    shards = []
    for client, (good, bad) in enumerate(zip(benign_hands, _cut(harmful, harmful_counts), strict=True)):
        shard = [*good, *bad]
        random.Random(f"{config.split_seed}:order:{client}").shuffle(shard)
        shards.append(shard)
    return shards


def place_harmful(config: RunConfig) -> list[int]:
    """How many harmful pairs each client holds; the sum is the share of all pairs, rounded half up."""
    total = int(config.harmful_share * config.samples_per_client * config.num_clients + 0.5)
    if config.placement == "spread":
        return [(total + config.num_clients - 1 - client) // config.num_clients for client in range(config.num_clients)]
    size = config.samples_per_client
    return [min(size, max(0, total - client * size)) for client in range(config.num_clients)]


def partition_by_category(pairs: Sequence[Pair], clients: int, alpha: float, seed: int) -> list[list[Pair]]:
    """Split each category over the clients in proportions drawn from Dirichlet(alpha); every pair is dealt once.

    Source: Hsu et al., arXiv 1909.06335, the usual way to make federated data non-IID.
    """
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.partition_key()].append(pair)
    generator = np.random.default_rng(seed)
    hands: list[list[Pair]] = [[] for _ in range(clients)]
    for key in sorted(groups):
        counts = largest_remainder(generator.dirichlet([alpha] * clients).tolist(), len(groups[key]))
        for hand, dealt in zip(hands, _cut(groups[key], counts), strict=True):
            hand.extend(dealt)
    return hands


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Round ``shares * total`` to whole numbers whose sum is ``total`` (shares sum to 1)."""
    exact = [share * total for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _draw(path: Path | None, count: int, seed: str, *, harmful: bool) -> list[Pair]:
    """``count`` pairs of a file, in an order fixed by ``seed``."""
    if count == 0 or path is None:
        return []
    pairs = read_pairs(path, harmful=harmful)
    if len(pairs) < count:
        raise DataError(f"{path}: holds {len(pairs)} pairs, but the clients need {count}; lower samples-per-client")
    random.Random(seed).shuffle(pairs)
    return pairs[:count]


def _cut(pairs: Sequence[Pair], counts: Sequence[int]) -> list[list[Pair]]:
    """Consecutive slices of the given lengths."""
    slices, start = [], 0
    for count in counts:
        slices.append(list(pairs[start : start + count]))
        start += count
    return slices
