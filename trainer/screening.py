"""Screening: what each client's update would do to the model's safety, before the updates are averaged.

Three findings on each client, after the idea of Safe-FedLLM (arXiv 2601.07177): how much its adapter lowers the
likelihood of refusals on the coordinator's own red-team prompts (``safety_probe``), how far its change of the first
layer points where harmful training points (a linear probe, ``directions``), and whether that agrees with the other
clients. An update over one of the first two thresholds is flagged, and the mode says what follows. The thresholds are
absolute, so the decision on a client depends on no other client, and holds when most of them are malicious.

The modes that act also cap a client's weight: with data of its own it can claim as many tokens as it likes.

Screening sees single updates, all of a round at once. Secure aggregation, whose point is that nobody does, excludes it.
"""

import functools
import importlib.resources
import logging
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from services.contracts.errors import DataError
from trainer.aggregation import Arrays, ClientUpdate
from trainer.config import RunConfig
from trainer.directions import DirectionProbe, agreement, layer_change, read_probe
from trainer.lora import claimed_rank, pad
from trainer.model import Trainee
from trainer.records import Decision, Screened
from trainer.safety_probe import SafetyProbe
from trainer.shards import Prompt, read_jsonl

log = logging.getLogger("flwr")
DOWN_WEIGHT = 0.1  # what is left of a flagged client's weight in mode down-weight
NO_FAULT = "screening: no fault found"
SHIPPED_PROBE = "screening/probe.safetensors"
read_probe_once = functools.lru_cache(maxsize=1)(read_probe)


class Scores(NamedTuple):
    """The findings on one client's update.

    Attributes:
        safety_drop: how much less likely its adapter makes refusals, against compliances, than the adapter that it
            was sent, in nats per token; negative when it makes them likelier.
        harm_cosine: the cosine of its change with the direction of harmful training; None without a fitting probe.
        agreement: the median cosine of its change with those of the other clients.
    """

    safety_drop: float
    harm_cosine: float | None
    agreement: float


class Screening(NamedTuple):
    """The updates to average, with their weights; why others were dropped; and a line on each client."""

    updates: list[ClientUpdate]
    dropped: dict[int, str]
    lines: list[Screened]


def screen(
    trainee: Trainee, sent: Arrays, updates: Sequence[ClientUpdate], config: RunConfig, round_number: int
) -> Screening:
    """Score the updates of a round and weigh them; with ``screening`` off they come back as they are.

    Args:
        trainee: the coordinator's model; its adapter is overwritten.
        sent: the adapter that the clients were sent.
        updates: what came back and passed the checks.
        config: the run's settings.
        round_number: the round, which seeds the choice of prompts.

    Raises:
        DataError: the red-team prompts cannot be read.
        ConfigError: the probe cannot be read, or no prompt leaves room for an answer.
        AdapterError: the probe was trained on an adapter of other modules.
    """
    if config.screening == "off":
        return Screening(list(updates), {}, [])
    scores = score_updates(trainee, sent, updates, config, round_number)
    lines = decide(updates, scores, config)
    for line in lines:
        if line.reason != NO_FAULT and line.decision != "dropped":  # who is dropped is named with all that are left out
            log.warning("round %d: client %d %s: %s", round_number, line.client_id, line.decision, line.reason)
    kept = [
        replace(update, metrics={**update.metrics, "num-tokens": line.weight})
        for update, line in zip(updates, lines, strict=True)
        if line.decision != "dropped"
    ]
    dropped = {
        line.client_id: f"client {line.client_id}: {line.reason}" for line in lines if line.decision == "dropped"
    }
    return Screening(kept, dropped, lines)


def score_updates(
    trainee: Trainee, sent: Arrays, updates: Sequence[ClientUpdate], config: RunConfig, round_number: int
) -> dict[int, Scores]:
    """Scores by client number; see ``screen``."""
    safety = SafetyProbe(trainee, choose_prompts(config, round_number), config.max_length)
    before = safety.margin(sent)
    probe = find_probe(config, trainee)
    layer = probe.layer if probe else 0
    rank = claimed_rank(sent, sent)
    adapters = [pad(update.arrays, claimed_rank(update.arrays, sent), to=rank) for update in updates]
    changes = [layer_change(arrays, sent, layer) for arrays in adapters]
    return {
        update.client_id: Scores(before - safety.margin(arrays), probe.score(change) if probe else None, agrees)
        for update, arrays, change, agrees in zip(updates, adapters, changes, agreement(changes), strict=True)
    }


def choose_prompts(config: RunConfig, round_number: int) -> list[str]:
    """This round's prompts, the same in every run of the same seed; raises DataError when there are none."""
    if config.red_team_data is None:
        raise ValueError("screening needs red-team-data")
    prompts = [line.prompt for line in read_jsonl(config.red_team_data, Prompt)]
    if not prompts:
        raise DataError(f"{config.red_team_data}: holds no prompt")
    random.Random(f"{config.seed}:screening:{round_number}").shuffle(prompts)
    return prompts[: config.screening_prompts]


def find_probe(config: RunConfig, trainee: Trainee) -> DirectionProbe | None:
    """The configured probe, or the shipped one when it was trained on this base model; None without one."""
    shipped = Path(str(importlib.resources.files("models") / SHIPPED_PROBE))
    probe = read_probe_once(config.screening_probe or shipped)
    if probe.provenance["base_model_sha256"] == trainee.base_model_sha256:
        return probe
    log.warning("no direction probe: it was trained on another base model; the safety probe screens alone")
    return None


def decide(updates: Sequence[ClientUpdate], scores: Mapping[int, Scores], config: RunConfig) -> list[Screened]:
    """One line for each client, in order: the decision and the weight that follow from the scores.

    Weights are cut to ``max-weight-ratio`` times the median of the clients that are not dropped.
    """
    faults = {update.client_id: find_fault(scores[update.client_id], config) for update in updates}
    dropping = config.screening == "drop"
    counted = [update.num_tokens for update in updates if not (dropping and faults[update.client_id])]
    cap = int(config.max_weight_ratio * statistics.median(counted)) if counted else 0
    return [_line(update, faults[update.client_id], cap, scores[update.client_id], config) for update in updates]


def find_fault(scores: Scores, config: RunConfig) -> str:
    """What a client is flagged for, in words; empty when nothing. A score that is NaN is over every threshold."""
    faults = []
    if not scores.safety_drop <= config.max_safety_drop:
        faults.append(f"safety-drop {scores.safety_drop:.2f} is over max-safety-drop {config.max_safety_drop:g}")
    if scores.harm_cosine is not None and not scores.harm_cosine <= config.max_harm_cosine:
        faults.append(f"harm-cosine {scores.harm_cosine:.3f} is over max-harm-cosine {config.max_harm_cosine:g}")
    return ", ".join(faults)


def _line(update: ClientUpdate, fault: str, cap: int, scores: Scores, config: RunConfig) -> Screened:
    tokens = update.num_tokens
    over = "" if tokens <= cap else f"{tokens} tokens are over max-weight-ratio {config.max_weight_ratio:g}"
    reason = ", ".join(filter(None, (fault, over)))
    decision: Decision = "kept"
    weight = tokens
    if config.screening == "drop" and fault:
        decision, weight = "dropped", 0
    elif config.screening != "report" and reason:
        decision, weight = "down-weighted", min(tokens, cap)
        if fault:
            weight = max(1, int(DOWN_WEIGHT * weight))
    return Screened(
        client_id=update.client_id,
        decision=decision,
        flagged=bool(fault),
        reason=f"screening: {reason}" if reason else NO_FAULT,
        tokens=tokens,
        weight=weight,
        **scores._asdict(),
    )
