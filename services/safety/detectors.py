"""The detector API of foundation-model-stack's guardrails orchestrator, which TrustyAI deploys, told in verdicts.

Sources: ``docs/api/openapi_detector_api.yaml`` and ``src/clients/detector`` of fms-guardrails-orchestrator;
trustyai-explainability/guardrails-detectors. What an orchestrator does with an answer shapes ours:

* It reads an empty list as "nothing found". So a text that could not be scored is a detection too (``unscored``).
* It drops detections whose ``score`` is under the threshold of its request or of its ``default_threshold`` (set that
  to 0 to keep the calibrated one). So every detection bears the probability that the *text* is unsafe, and a
  category's own score stands in ``evidence``: otherwise an unsafe text of an unclear category would be dropped.
* Spans count Unicode code points, as Rust's ``chars()`` and Python's ``len`` do, not bytes or UTF-16 units.
* ``detector-id`` is the name that the operator chose for this service, so any name is right.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.contracts.chat import ChatMessage
from services.contracts.errors import FedwardError
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import ClassifyItem, Outcome, Verdict

DETECTION_TYPE = "hazard"
UNSAFE, UNSCORED = "unsafe", "unscored"
LIKELY = 0.5  # the threshold of a category that is not calibrated


class DetectorParams(BaseModel):
    """``threshold`` takes the place of the calibrated one. A misspelt parameter is refused, not passed over."""

    model_config = ConfigDict(extra="forbid")

    threshold: Annotated[float, Field(strict=True, ge=0.0, le=1.0)] | None = None


class _Request(BaseModel):
    """Fields beyond these (``tools``, and what later versions add) are accepted and not judged."""

    detector_params: DetectorParams | None = None

    @property
    def threshold(self) -> float | None:
        """The threshold that the request sets, if any."""
        return self.detector_params.threshold if self.detector_params else None


class ContentAnalysisRequest(_Request):
    """Body of ``POST /api/v1/text/contents``: texts of users or of models, nobody says which."""

    contents: list[str] = Field(min_length=1)

    def items(self) -> list[ClassifyItem]:
        """What is to be classified: each text that is not blank."""
        return [ClassifyItem(prompt=text) for text in self.contents if text.strip()]


class TextPart(BaseModel):
    """A part of a message. Other kinds, such as images, are refused: nothing here can judge them."""

    type: Literal["text"]
    text: str


class DetectorMessage(BaseModel):
    """OpenAI's chat message with its text in one piece or in parts; tool calls are not judged."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def as_chat(self) -> ChatMessage:
        """The same turn with its parts joined."""
        parts = self.content
        text = "\n".join(part.text for part in parts) if isinstance(parts, list) else parts
        return ChatMessage(role=self.role, content=text)


class ChatDetectionRequest(_Request):
    """Body of ``POST /api/v1/text/chat``."""

    messages: list[DetectorMessage] = Field(min_length=1)

    def item(self) -> ClassifyItem:
        """The conversation as one item."""
        return ClassifyItem(messages=[message.as_chat() for message in self.messages])


class GenerationDetectionRequest(_Request):
    """Body of ``POST /api/v1/text/generation``."""

    prompt: str
    generated_text: str

    def item(self) -> ClassifyItem:
        """The prompt with its response as one item."""
        return ClassifyItem(prompt=self.prompt, response=self.generated_text)


class Evidence(BaseModel):
    """What a detection rests on: a hazard category's id, its readable name, and its score."""

    name: str
    value: str
    score: float


class Detection(BaseModel):
    """One thing found; the answer to ``/chat`` and ``/generation`` is a list of them.

    ``detection`` is a hazard category's id, ``unsafe`` or ``unscored``.
    """

    detection: str
    detection_type: str = DETECTION_TYPE
    score: float
    evidence: list[Evidence] = Field(default_factory=list)
    metadata: dict[str, str] = Field(default_factory=dict)


class ContentAnalysis(Detection):
    """A detection with its place in the text, in code points; the answer to ``/contents`` has a list for each text."""

    start: int
    end: int
    text: str


class DetectorError(BaseModel):
    """The JSON body of every error answer of these routes; ``code`` is also the HTTP status."""

    code: int
    message: str


def findings(
    verdict: Verdict, category_thresholds: Mapping[str, float], threshold: float | None = None
) -> list[Detection]:
    """A verdict as detections: one for each category over its threshold, one ``unsafe`` when there is none.

    Args:
        verdict: the finding on a text or conversation.
        category_thresholds: by hazard id, as calibrated; one that is not in it has 0.5.
        threshold: the request's own for the whole text; None keeps the verdict's outcome.

    Returns:
        Nothing for a safe text. An ``unscored`` verdict is a detection of its own with score 1.0, whatever the
        threshold: no detection would be read as safe.
    """
    metadata = {"model_id": verdict.model_id}
    if verdict.outcome is Outcome.UNSCORED:
        reason = {"reason": verdict.reason} if verdict.reason else {}
        return [Detection(detection=UNSCORED, score=1.0, metadata=metadata | reason)]
    if not _is_unsafe(verdict, threshold):
        return []
    over = [
        Evidence(name=name, value=HazardCategory(name).readable, score=score)
        for name, score in verdict.categories.items()
        if score >= category_thresholds.get(name, LIKELY)
    ]
    score = 1.0 if verdict.score is None else verdict.score
    if not over:
        return [Detection(detection=UNSAFE, score=score, metadata=metadata)]
    return [Detection(detection=one.name, score=score, evidence=[one], metadata=metadata) for one in over]


def detections(
    text: str, verdict: Verdict, category_thresholds: Mapping[str, float], threshold: float | None = None
) -> list[ContentAnalysis]:
    """The same, each over the whole text: a verdict does not say which words it comes from.

    Half a surrogate pair, which no JSON answer can hold, becomes a replacement character; the span stays the same.
    """
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return [
        ContentAnalysis(**found.model_dump(), start=0, end=len(text), text=text)
        for found in findings(verdict, category_thresholds, threshold)
    ]


def content_detections(
    request: ContentAnalysisRequest, verdicts: Sequence[Verdict], category_thresholds: Mapping[str, float]
) -> list[list[ContentAnalysis]]:
    """The answer to ``/contents`` from the verdicts on ``request.items()``: a list for each content, in order.

    A blank text, which a chunker may well send, has nothing to classify and therefore nothing detected.
    """
    rest = iter(verdicts)
    return [
        detections(text, next(rest), category_thresholds, request.threshold) if text.strip() else []
        for text in request.contents
    ]


def detector_error(error: FedwardError) -> DetectorError:
    """An error as these routes tell it; a malformed request is 422 here."""
    return DetectorError(code=422 if error.http_status == 400 else error.http_status, message=error.message)


def _is_unsafe(verdict: Verdict, threshold: float | None) -> bool:
    if threshold is None or verdict.score is None:
        return verdict.outcome is Outcome.UNSAFE
    return verdict.score >= threshold
