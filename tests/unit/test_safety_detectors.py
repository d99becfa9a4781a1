"""The detector API's JSON, field by field as the guardrails orchestrator documents it."""

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from services.contracts.errors import BodyTooLarge, Overloaded, RequestError
from services.contracts.verdicts import Outcome, Verdict
from services.safety.detectors import (
    ChatDetectionRequest,
    ContentAnalysis,
    ContentAnalysisRequest,
    GenerationDetectionRequest,
    content_detections,
    detections,
    detector_error,
    findings,
)

THRESHOLDS = {"S1": 0.3, "S10": 0.8}
NO_THRESHOLDS: list[Any] = ["0.5", "high", True, -0.1, 1.1, float("nan"), float("inf"), [], {}]


def verdict(
    score: float | None = 0.9, outcome: Outcome = Outcome.UNSAFE, categories: dict[str, float] | None = None
) -> Verdict:
    return Verdict(outcome=outcome, score=score, threshold=0.4, categories=categories or {}, model_id="model-1")


SAFE = verdict(0.1, Outcome.SAFE)
UNSCORED = Verdict(outcome=Outcome.UNSCORED, model_id="model-1", reason="the guard model is unreachable")


def request(**body: Any) -> ContentAnalysisRequest:
    return ContentAnalysisRequest.model_validate(body)


def test_answer_to_contents_is_the_documented_json() -> None:
    body = request(contents=["one text", "another"])
    answer = content_detections(body, [verdict(0.9, categories={"S1": 0.35, "S10": 0.7}), SAFE], THRESHOLDS)
    assert json.loads(TypeAdapter(list[list[ContentAnalysis]]).dump_json(answer)) == [
        [
            {
                "start": 0,
                "end": 8,
                "text": "one text",
                "detection": "S1",
                "detection_type": "hazard",
                "score": 0.9,
                "evidence": [{"name": "S1", "value": "Violent crimes", "score": 0.35}],
                "metadata": {"model_id": "model-1"},
            }
        ],
        [],
    ]


def test_each_category_over_its_threshold_is_a_detection() -> None:
    scores = {"S1": 0.3, "S2": 0.49, "S9": 0.5, "S10": 0.79}
    assert [one.detection for one in findings(verdict(categories=scores), THRESHOLDS)] == ["S1", "S9"]


def test_unsafe_text_without_a_category_is_one_detection() -> None:
    found = findings(verdict(0.9, categories={"S1": 0.2}), THRESHOLDS)
    assert [(one.detection, one.score) for one in found] == [("unsafe", 0.9)]


def test_category_alone_does_not_make_a_safe_text_unsafe() -> None:
    """A refusal names the harm that it declines."""
    assert findings(verdict(0.1, Outcome.SAFE, {"S1": 0.9}), THRESHOLDS) == []


def test_every_detection_of_an_unsafe_text_survives_the_orchestrators_filter() -> None:
    """The orchestrator keeps detections by score; the text's own score is what its threshold is about."""
    found = findings(verdict(0.9, categories={"S1": 0.35, "S9": 0.55}), THRESHOLDS)
    assert {one.score for one in found} == {0.9}


@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
def test_unscored_is_never_nothing(threshold: float | None) -> None:
    (found,) = findings(UNSCORED, THRESHOLDS, threshold)
    assert (found.detection, found.score) == ("unscored", 1.0)
    assert found.metadata == {"model_id": "model-1", "reason": "the guard model is unreachable"}


def test_unsafe_verdict_without_a_score_counts_as_certain() -> None:
    (found,) = findings(verdict(None), THRESHOLDS, 0.99)
    assert (found.detection, found.score) == ("unsafe", 1.0)


@pytest.mark.parametrize(
    ("score", "outcome", "threshold", "flagged"),
    [
        (0.5, Outcome.UNSAFE, None, True),
        (0.5, Outcome.UNSAFE, 0.6, False),
        (0.5, Outcome.UNSAFE, 0.5, True),
        (0.3, Outcome.SAFE, None, False),
        (0.3, Outcome.SAFE, 0.2, True),
        (0.0, Outcome.SAFE, 0.0, True),
    ],
)
def test_threshold_of_the_request_takes_the_place_of_the_calibrated_one(
    score: float, outcome: Outcome, threshold: float | None, flagged: bool
) -> None:
    body = request(contents=["text"], detector_params={"threshold": threshold})
    (found,) = content_detections(body, [verdict(score, outcome)], THRESHOLDS)
    assert bool(found) == flagged


@pytest.mark.parametrize(
    ("text", "code_points"),
    [
        ("plain", 5),
        ("", 0),
        ("\N{BOMB}", 1),  # 4 bytes, 2 UTF-16 units
        ("e\N{COMBINING ACUTE ACCENT}", 2),
        ("\N{WOMAN}\N{ZERO WIDTH JOINER}\N{FIRE ENGINE}", 3),
        ("a\r\nb\0", 5),
    ],
)
def test_span_is_the_whole_text_in_code_points(text: str, code_points: int) -> None:
    (found,) = detections(text, verdict(), THRESHOLDS)
    assert (found.start, found.end, found.text) == (0, code_points, text)


def test_blank_contents_keep_their_places() -> None:
    body = request(contents=["", "first", " \n", "second"])
    assert [item.prompt for item in body.items()] == ["first", "second"]
    answer = content_detections(body, [SAFE, verdict()], THRESHOLDS)
    assert [[one.text for one in found] for found in answer] == [[], [], [], ["second"]]


@pytest.mark.parametrize("body", [{}, {"detector_params": None}, {"detector_params": {}}, {"later_field": 1}])
def test_what_may_be_left_out_or_added(body: dict[str, Any]) -> None:
    assert request(contents=["text"], **body).threshold is None


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "contents"),
        ({"contents": []}, "contents"),
        ({"contents": "text"}, "contents"),
        ({"contents": [7]}, "contents.0"),
        ({"contents": ["text"], "detector_params": []}, "detector_params"),
        ({"contents": ["text"], "detector_params": {"treshold": 0.5}}, "detector_params.treshold"),
        *(
            ({"contents": ["text"], "detector_params": {"threshold": value}}, "detector_params.threshold")
            for value in NO_THRESHOLDS
        ),
    ],
)
def test_bad_body_is_refused_by_name(body: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        request(**body)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == named


def test_chat_is_one_conversation_with_its_parts_joined() -> None:
    body = ChatDetectionRequest.model_validate(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "First."}, {"type": "text", "text": "Second."}]},
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
            ],
            "tools": [{"type": "function"}],
            "detector_params": {"threshold": 0.7},
        }
    )
    messages = body.item().messages or []
    assert [(message.role, message.content) for message in messages] == [
        ("system", "Be brief."),
        ("user", "First.\nSecond."),
        ("assistant", None),
    ]
    assert body.threshold == 0.7


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]},
        {"role": "narrator", "content": "text"},
        {"content": "text"},
    ],
)
def test_message_that_cannot_be_judged_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChatDetectionRequest.model_validate({"messages": [message]})


def test_generation_is_a_prompt_with_its_response() -> None:
    body = GenerationDetectionRequest.model_validate({"prompt": "a", "generated_text": "b", "detector_params": {}})
    assert (body.item().prompt, body.item().response) == ("a", "b")


@pytest.mark.parametrize(
    ("error", "code"), [(RequestError("no"), 422), (BodyTooLarge("no"), 413), (Overloaded("no"), 429)]
)
def test_error_body_is_a_number_and_a_message(error: RequestError, code: int) -> None:
    assert detector_error(error).model_dump() == {"code": code, "message": "no"}
