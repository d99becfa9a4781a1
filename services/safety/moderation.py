"""OpenAI's moderation contract, and how a verdict is told in it.

Source: OpenAI API reference, ``POST /v1/moderations``. OpenAI's categories are not ours: a hazard category is
reported under its own id (``S1`` .. ``S14``) and, where one means nearly the same, also under OpenAI's name.
OpenAI's names without a counterpart are always False and 0.0, because nothing here measures them.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from services.contracts.verdicts import ClassifierInfo, Outcome, Verdict

# OpenAI's names that a client expects, each with the hazard categories that mean it.
COUNTERPARTS: dict[str, tuple[str, ...]] = {
    "harassment": (),
    "harassment/threatening": (),
    "hate": ("S10",),
    "hate/threatening": (),
    "illicit": ("S2",),
    "illicit/violent": ("S9",),
    "self-harm": ("S11",),
    "self-harm/instructions": (),
    "self-harm/intent": (),
    "sexual": ("S12",),
    "sexual/minors": ("S4",),
    "violence": ("S1",),
    "violence/graphic": (),
}
# Names that OpenAI's own clients send; the answer says which model really ran.
ALIASES = ("omni-moderation-latest", "text-moderation-latest", "text-moderation-stable")
LIKELY = 0.5  # the threshold of a category that is not calibrated


class ModerationRequest(BaseModel):
    """Body of ``POST /v1/moderations``; images are not read, so a list of parts is refused."""

    model_config = ConfigDict(extra="allow")

    input: str | list[str]
    model: str = ALIASES[0]

    def texts(self) -> list[str]:
        """The texts, however they were given."""
        return [self.input] if isinstance(self.input, str) else self.input


def moderation(verdicts: list[Verdict], info: ClassifierInfo) -> dict[str, Any]:
    """OpenAI's answer for these verdicts, one result each.

    An unsafe text is put in each category over its threshold, and always in the likeliest.
    """
    results = [_result(verdict, info.category_thresholds) for verdict in verdicts]
    return {"id": f"modr-{uuid.uuid4().hex}", "model": info.model_id, "results": results}


def _result(verdict: Verdict, thresholds: Mapping[str, float]) -> dict[str, Any]:
    flagged = verdict.outcome is not Outcome.SAFE
    likeliest = max(verdict.categories, key=lambda name: verdict.categories[name], default=None)
    named = {
        name: flagged and (score >= thresholds.get(name, LIKELY) or name == likeliest)
        for name, score in verdict.categories.items()
    }
    categories = {name: any(named.get(hazard, False) for hazard in hazards) for name, hazards in COUNTERPARTS.items()}
    scores = {
        name: max((verdict.categories.get(hazard, 0.0) for hazard in hazards), default=0.0)
        for name, hazards in COUNTERPARTS.items()
    }
    return {
        "flagged": flagged,
        "categories": categories | named,
        "category_scores": scores | verdict.categories | {"unsafe": verdict.score or 0.0},
        "category_applied_input_types": {name: ["text"] for name in categories | named},
    }
