"""An operator's labelled items as training data: the split by prompt, and what each head learns from an item."""

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

from services.safety.training.answers import own_answers
from services.safety.training.contrast import contrast_rows
from services.safety.training.labelled import KINDS, Labelled
from services.safety.training.samples import Sample, training_samples


class Parts(NamedTuple):
    """Labelled items in three parts; all items with the same prompt stand in one of them."""

    train: list[Labelled]
    calibrate: list[Labelled]
    test: list[Labelled]


def split(items: Sequence[Labelled], held_out: float, seed: int) -> Parts:
    """Split by prompt, alike for prompts with unsafe items and for those without.

    Args:
        items: all items.
        held_out: the share of prompts that is not trained on.
        seed: another one gives another split.
    """
    groups: dict[str, list[Labelled]] = {}
    for item in items:
        groups.setdefault("\n".join(item.conversation.prompts), []).append(item)
    strata: dict[tuple[bool, ...], list[str]] = {}
    for prompt in sorted(groups, key=lambda text: hashlib.sha256(f"{seed} {text}".encode("utf-8", "replace")).digest()):
        labels = [(item.kind, item.unsafe) for item in groups[prompt]]
        strata.setdefault(tuple((kind, True) in labels for kind in KINDS), []).append(prompt)
    parts = Parts([], [], [])
    for prompts in strata.values():
        count = round(held_out * len(prompts))
        for part, chosen in zip(parts, (prompts[count:], prompts[:count:2], prompts[1:count:2]), strict=True):
            part.extend(item for prompt in chosen for item in groups[prompt])
    return parts


def samples_of(items: Sequence[Labelled]) -> list[Sample]:
    """What the heads learn from labelled items.

    A safe conversation has only safe prompts; of an unsafe one without a response, the last prompt counts as unsafe.
    With a response the label is about that, and nothing is known of the prompts.
    """
    samples = []
    for item in items:
        conversation = item.conversation
        group = "\n".join(conversation.prompts)
        if conversation.response is None:
            texts = conversation.prompts[-1:] if item.unsafe else conversation.prompts
            samples += [Sample(t, item.unsafe, None, None, item.category, "labelled", 1.0, group) for t in texts]
        elif conversation.response.strip():
            text = conversation.response
            samples.append(Sample(text, None, item.unsafe, item.refused, item.category, "labelled", 1.0, group))
    return samples


def replay(count: int, seed: int) -> list[Sample]:
    """Prompts and answers of our own wording, some of each, from which the shipped adapter learnt too.

    Without them, tuning on a narrow subject makes the model forget what else is harmful.
    """
    rng = random.Random(seed)
    prompts, answers = contrast_rows(0), own_answers(0)
    half = min(count // 2, len(prompts), len(answers))
    return training_samples(rng.sample(prompts, half), rng.sample(answers, half))
