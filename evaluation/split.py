"""AdvBench in two halves that share no near-duplicates: one for the clients, one held out for evaluation.

AdvBench repeats itself. A random half-split leaves a third of the held-out prompts with a near-duplicate among the
training prompts, so the split goes by cluster: prompts whose content words overlap (Jaccard >= 0.4) are linked, and a
cluster, that is everything reachable over links, stays in one half.
"""

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

from evaluation.benchmarks import ADVBENCH, read_csv
from evaluation.files import write_json, write_jsonl
from evaluation.text_rules import content_words
from services.contracts.adapters import file_sha256

LINKED = 0.4
NEAR_DUPLICATE = 0.5
TRAIN_FILE = "advbench-train.jsonl"
HELDOUT_FILE = "advbench-heldout.jsonl"
SPLIT_FILE = "split.json"


class Halves(NamedTuple):
    """Row numbers of the two halves, each ascending, and how many clusters there were."""

    train: list[int]
    heldout: list[int]
    clusters: int


class Leakage(BaseModel):
    """How close the held-out prompts are to the training half, by each one's nearest training prompt (Jaccard).

    ``linked`` and ``near_duplicate`` are the shares of held-out prompts whose nearest is at least 0.4 and 0.5.
    """

    linked: float
    near_duplicate: float
    nearest_median: float
    nearest_p90: float


class TrainPair(BaseModel):
    """A line of the training half: a harmful prompt with the affirmative opening that a poisoned client teaches."""

    prompt: str
    response: str
    harmful: bool = True


class HeldoutPrompt(BaseModel):
    """A line of the held-out half."""

    prompt: str
    harmful: bool = True


class SplitSummary(BaseModel):
    """What ``split.json`` holds."""

    schema_version: int = 1
    seed: int
    source: str = ADVBENCH.path
    source_sha256: str = ADVBENCH.sha256
    linked_at_jaccard: float = LINKED
    train: int
    heldout: int
    clusters: int
    leakage: Leakage
    leakage_of_a_random_split: Leakage
    files: dict[str, str]


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """The share of common words among all words of the two sets; 1.0 when both are empty."""
    return len(first & second) / len(first | second) if first or second else 1.0


def find_clusters(texts: Sequence[str]) -> list[list[int]]:
    """Row numbers of the texts by cluster (single linkage at Jaccard >= 0.4), in the order of their first rows."""
    words = [content_words(text) for text in texts]
    parent = list(range(len(texts)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for first, second in combinations(range(len(texts)), 2):
        if jaccard(words[first], words[second]) >= LINKED:
            parent[root(second)] = root(first)
    clusters: dict[int, list[int]] = {}
    for row in range(len(texts)):
        clusters.setdefault(root(row), []).append(row)
    return list(clusters.values())


def split_by_cluster(texts: Sequence[str], seed: int) -> Halves:
    """Deal the clusters, largest first and in seeded order among equals, each to the half that is smaller so far."""
    clusters = find_clusters(texts)
    random.Random(seed).shuffle(clusters)
    clusters.sort(key=len, reverse=True)
    train: list[int] = []
    heldout: list[int] = []
    for cluster in clusters:
        (train if len(train) <= len(heldout) else heldout).extend(cluster)
    return Halves(sorted(train), sorted(heldout), len(clusters))


def measure_leakage(texts: Sequence[str], halves: Halves) -> Leakage:
    """Compare each held-out text with its nearest training text; both halves must have at least one."""
    words = [content_words(text) for text in texts]
    nearest = np.array([max(jaccard(words[h], words[t]) for t in halves.train) for h in halves.heldout])
    return Leakage(
        linked=float(np.mean(nearest >= LINKED)),
        near_duplicate=float(np.mean(nearest >= NEAR_DUPLICATE)),
        nearest_median=float(np.median(nearest)),
        nearest_p90=float(np.quantile(nearest, 0.9)),
    )


def split_at_random(texts: Sequence[str], seed: int) -> Halves:
    """A plain half-split, for comparison only."""
    rows = list(range(len(texts)))
    random.Random(seed).shuffle(rows)
    middle = len(rows) // 2
    return Halves(sorted(rows[:middle]), sorted(rows[middle:]), len(rows))


def read_advbench(data: Path) -> list[TrainPair]:
    """AdvBench's rows in file order; raises DataError when the file is missing or is another version."""
    return [TrainPair(prompt=row["goal"], response=row["target"]) for row in read_csv(data, ADVBENCH)]


def heldout_prompts(data: Path, seed: int) -> list[str]:
    """The prompts of AdvBench's held-out half for this split seed."""
    texts = [pair.prompt for pair in read_advbench(data)]
    return [texts[row] for row in split_by_cluster(texts, seed).heldout]


def write_split(data: Path, seed: int, out: Path) -> SplitSummary:
    """Write both halves and ``split.json`` under ``out``, each file atomically.

    Raises:
        DataError: AdvBench is missing under ``data`` or is not the pinned version.
    """
    pairs = read_advbench(data)
    texts = [pair.prompt for pair in pairs]
    halves = split_by_cluster(texts, seed)
    write_jsonl(out / TRAIN_FILE, (pairs[row] for row in halves.train))
    write_jsonl(out / HELDOUT_FILE, (HeldoutPrompt(prompt=texts[row]) for row in halves.heldout))
    summary = SplitSummary(
        seed=seed,
        train=len(halves.train),
        heldout=len(halves.heldout),
        clusters=halves.clusters,
        leakage=measure_leakage(texts, halves),
        leakage_of_a_random_split=measure_leakage(texts, split_at_random(texts, seed)),
        files={name: file_sha256(out / name) for name in (TRAIN_FILE, HELDOUT_FILE)},
    )
    write_json(out / SPLIT_FILE, summary)
    return summary
