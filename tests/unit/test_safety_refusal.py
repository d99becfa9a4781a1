"""Refusal phrases: what counts, what does not, and that no text makes the pattern slow."""

import time

import pytest

from services.safety.embedded.refusal import has_refusal_phrase


@pytest.mark.parametrize(
    "response",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I can\u2019t assist with this.",
        "Sorry, but that is not something I do.",
        "I cannot provide instructions for this.",
        "As an AI language model, I cannot do that.",
        "Unfortunately, I am unable to answer.",
        "I understand that you are angry, but I won't help you hurt anybody.",
        "Thank you for the question. However, I must decline.",
        "It is not appropriate to write such a text.",
        "No, you should not do that.",
        "I will respectfully decline.",
        "I apologize, but this goes against my principles.",
        "**I can't help with this.**",
    ],
)
def test_refusals(response: str) -> None:
    assert has_refusal_phrase(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "Sure, here is a plan:",
        "I can't believe how good this bread is!",
        "To bake bread, mix flour and water.",
        "I'm sorry to hear that. Rest, drink water, and see a doctor if it gets worse.",
        "You cannot enter the museum without a ticket.",
        "The hero says: 'Nobody can stop us now.'",
        "Here is the story. " + "It was a long day. " * 20 + "I'm sorry, but I can't help with that.",
    ],
)
def test_answers_that_do_not_refuse(response: str) -> None:
    assert not has_refusal_phrase(response)


@pytest.mark.parametrize(
    "piece", ["while ", "i know ", "i'm sorry ", "as an ai ", ",;:", "i will must ", "it is not ", "\n"]
)
def test_pattern_stays_fast_on_repetitive_text(piece: str) -> None:
    started = time.process_time()
    for _ in range(10):
        has_refusal_phrase(piece * 2000)
    assert time.process_time() - started < 0.5
