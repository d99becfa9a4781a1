"""Contract of the safety service: what is classified, and the verdict that comes back."""

from enum import StrEnum

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

    ``score`` is the probability in [0, 1] that the item is unsafe; ``threshold`` the value it was compared
    with. With a response, the item is unsafe when the *response* is: refusing an unsafe prompt is safe.
    ``refused`` says whether the response declines; it is None when there is no response.
    """

    outcome: Outcome
    score: float | None = Field(default=None, ge=0.0, le=1.0)
    threshold: float | None = None
    categories: dict[str, float] = Field(default_factory=dict)
    refused: bool | None = None
    model_id: str
    reason: str | None = None


class ClassifyResponse(BaseModel):
    """Answer of ``POST /v1/classify``: one verdict per item, in order."""

    verdicts: list[Verdict]


class ClassifierInfo(BaseModel):
    """Answer of ``GET /v1/model``: which classifier runs, at which threshold, measured how."""

    model_id: str
    tier: str
    sha256: str
    threshold: float
    measured: dict[str, float] = Field(default_factory=dict)
