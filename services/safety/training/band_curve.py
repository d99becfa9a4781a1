"""What a cascade finds when its uncertain band grows, and which band is worth its price.

The service has one band of scores for prompts and responses, which have thresholds of their own. So the band grows,
in logits, around the mean of the items' thresholds: it follows the kind that the data has most of. Every figure is
counted with the rule that the service applies, ``low <= score < high``, and what the embedded model could not read
goes to the guard model whatever the band.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.special import expit, logit

from services.contracts.verdicts import Accuracy
from services.safety.backends import Band
from services.safety.training.figures import Bools, Floats, accuracy

CERTAIN = 1e-9  # scores nearer to 0 or 1 than this have the same logit


class Cases(NamedTuple):
    """Labelled items (n,), and what both models say of each.

    Args:
        scores: P(unsafe) by the embedded model, ``UNSCORED`` where it gave none.
        thresholds: what each score is compared with; prompts and responses have their own.
        first: the embedded model does not call it safe.
        second: the guard model does not call it safe, which counts its ``unscored`` verdicts as flags.
        unsafe: the labels.
    """

    scores: Floats
    thresholds: Floats
    first: Bools
    second: Bools
    unsafe: Bools


class Step(BaseModel):
    """A cascade with one band. Without a band it is the embedded model alone.

    ``at_most`` is the share of the items that the band was to send to the guard model, ``share`` what it does send.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_most: float
    band: Band | None
    sent: int
    share: float
    accuracy: Accuracy
    recall_gained: float
    f1_gained: float


def curve(cases: Cases, shares: Sequence[float]) -> list[Step]:
    """The step for each share."""
    return [step(cases, share) for share in shares]


def step(cases: Cases, share: float) -> Step:
    """The cascade that sends at most this share of the items.

    Args:
        cases: with both labels among them.
        share: in [0, 1]; 0 is the embedded model alone.
    """
    band = widest_band(cases, share)
    sent = is_sent(cases.scores, band)
    alone = accuracy(cases.first, cases.unsafe)
    found = accuracy(np.where(sent, cases.second, cases.first), cases.unsafe)
    return Step(
        at_most=share,
        band=band,
        sent=int(sent.sum()),
        share=float(sent.mean()),
        accuracy=found,
        recall_gained=_gained(found.recall, alone.recall),
        f1_gained=_gained(found.f1, alone.f1),
    )


def widest_band(cases: Cases, share: float) -> Band | None:
    """The widest band that sends at most this share of the items; None when that is not one item.

    Items at the same distance are sent together or not at all.
    """
    if share >= 1.0:
        return Band(0.0, 1.0)
    read = np.isfinite(cases.scores)
    allowed = int(share * len(cases.scores) + 1e-9) - int((~read).sum())
    if allowed < 1:
        return None
    centre = float(_logits(cases.thresholds).mean())
    distances = np.sort(np.abs(_logits(cases.scores[read]) - centre))
    if allowed >= len(distances):
        return Band(0.0, 1.0)
    inside = distances[distances < distances[allowed]]
    if not inside.size:
        return None
    width = (inside[-1] + distances[allowed]) / 2
    return Band(float(expit(centre - width)), float(expit(centre + width)))


def is_sent(scores: Floats, band: Band | None) -> Bools:
    """Which items (n,) the service would send to the guard model; none without a band, for there is no cascade."""
    if band is None:
        return np.zeros(len(scores), bool)
    return ~np.isfinite(scores) | ((scores >= band.low) & (scores < band.high))


def narrowest(steps: Sequence[Step], gain: float) -> Step | None:
    """The first step that reaches a share of the F1 gain that the best step brings; None when none brings any.

    Args:
        steps: from narrow to wide.
        gain: the share, in (0, 1].
    """
    possible = max(one.f1_gained for one in steps)
    if possible <= 0.0:
        return None
    return next(one for one in steps if one.f1_gained >= gain * possible)


def _logits(probabilities: Floats) -> Floats:
    found: Floats = logit(np.clip(probabilities, CERTAIN, 1.0 - CERTAIN))
    return found


def _gained(found: float | None, alone: float | None) -> float:
    assert found is not None
    assert alone is not None
    return found - alone
