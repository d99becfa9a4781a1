"""Contract of the safety service: what is classified, and the verdict that comes back."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.contracts.chat import ChatMessage


class Outcome(StrEnum):
    """A verdict's three states; an unreachable or unparseable classifier is ``unscored``, never ``safe``."""

    SAFE = "safe"
    UNSAFE = "unsafe"
    UNSCORED = "unscored"


class ClassifyItem(BaseModel):
    """One text to classify: a prompt, a prompt with its response, or a whole conversation."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = None
    response: str | None = None
    messages: list[ChatMessage] | None = None

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> "ClassifyItem":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' (with or without 'response') or 'messages'")
        if self.messages is not None and self.response is not None:
            raise ValueError("'response' goes with 'prompt'; in 'messages' it is the last assistant message")
        return self


class ClassifyRequest(BaseModel):
    """Body of ``POST /v1/classify``."""

    model_config = ConfigDict(extra="forbid")

    items: list[ClassifyItem] = Field(min_length=1)


class Verdict(BaseModel):
    """The classifier's finding on one item.

    ``score`` is the probability in [0, 1] that the item is unsafe; ``threshold`` the value it was compared with.
    ``categories`` has the scores of those hazards that were judged by themselves; of any other, ``score`` is all that
    is known. With a response, the item is unsafe when the *response* is: refusing an unsafe prompt is safe.
    ``refused`` says whether the response declines; it is None when there is no response.
    """

    outcome: Outcome
    score: float | None = Field(default=None, ge=0.0, le=1.0)
    threshold: float | None = None
    categories: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]] = Field(default_factory=dict)
    refused: bool | None = None
    model_id: str
    reason: str | None = None


class ClassifyResponse(BaseModel):
    """Answer of ``POST /v1/classify``: one verdict per item, in order."""

    verdicts: list[Verdict]


class Accuracy(BaseModel):
    """How well a threshold separates labelled data; shares with 95 % Wilson intervals, None where there is no item.

    ``h_mean`` is the harmonic mean of recall and of the share of safe items that pass; unlike ``f1`` it does not
    depend on how many items of each kind the data has.
    """

    unsafe: int = Field(ge=0)
    safe: int = Field(ge=0)
    recall: float | None = None
    recall_interval: tuple[float, float] | None = None
    false_positives: float | None = None
    false_positives_interval: tuple[float, float] | None = None
    precision: float | None = None
    f1: float | None = None
    h_mean: float | None = None


class CalibrationInfo(BaseModel):
    """On which labelled data the thresholds in use were chosen, and how well they do there."""

    data: str
    data_sha256: str
    rows: int
    prompt: Accuracy | None = None
    response: Accuracy | None = None
    categories: dict[str, Accuracy] = Field(default_factory=dict)


class ClassifierInfo(BaseModel):
    """Answer of ``GET /v1/model``: which classifier runs, at which operating point, measured how.

    ``threshold`` is that of prompts; ``response_threshold`` is None where prompts and responses share one.
    ``calibration`` is None for a model that nobody has calibrated: nothing is known of its recall.
    """

    model_id: str
    tier: str
    sha256: str
    threshold: float
    response_threshold: float | None = None
    category_thresholds: dict[str, float] = Field(default_factory=dict)
    operating_point: str | None = None
    calibration: CalibrationInfo | None = None
