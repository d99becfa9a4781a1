"""Unsafe parts of answers that are redacted, over real sockets: nothing unsafe leaves, and all the rest does."""

import pytest

from tests.fakes.gateway_protocols import CHAT, COMPLETIONS, TGI, Speaker, by_name, openais, streamed_or_not
from tests.fakes.gateway_repairs import REFUSAL, RepairStack, note, repaired, sentences, text_of, with_removed
from tests.fakes.gateway_stack import by_sentence, events
from tests.fakes.gateway_upstreams import MARKER


@by_name
@streamed_or_not
@pytest.mark.parametrize("bad", [(0,), (2,), (4,), (0, 1), (1, 3), (0, 1, 2, 3, 4)], ids=str)
def test_unsafe_sentences_are_removed_and_all_others_leave(
    repairs: RepairStack, speaker: Speaker, bad: tuple[int, ...], stream: bool
) -> None:
    repairs.answer(sentences(5, *bad))
    response = speaker.ask(repairs, stream=stream)
    assert response.status_code == 200
    assert MARKER not in response.text
    assert text_of(speaker, response) == with_removed(repairs.inference.pieces)
    assert speaker.finish_reason(response) in ("stop", "eos_token")
    assert note(response) == repaired(response, "redact", whole=not stream)
    first = not stream or 0 in bad
    assert response.headers["x-fedward-decision"] == ("redact" if first else "allow")


@by_name
@pytest.mark.parametrize("held", ["redact", "redact held"])
def test_words_in_pieces_that_leave_one_by_one(repairs: RepairStack, speaker: Speaker, held: str) -> None:
    text = "".join(sentences(6, 1, 4)).strip()
    repairs.answer(list(text), pause=lambda i: 0.02 if i % 25 == 0 else 0.0)
    response = speaker.ask(repairs, stream=True, hasty_with=held)
    assert text_of(speaker, response) == with_removed(sentences(6, 1, 4)).strip()
    assert MARKER not in response.text


def test_sentence_that_ends_the_answer_is_removed_with_the_end(repairs: RepairStack) -> None:
    repairs.answer(["One. ", "Two. ", f"And the {MARKER}."])
    response = CHAT.ask(repairs, stream=True)
    assert text_of(CHAT, response) == "One. Two. [removed]"
    assert [part["choices"][0]["finish_reason"] for part in events(response)[-3:-1]] == [None, "stop"]


@by_name
def test_answer_that_is_unsafe_only_as_a_whole_is_refused(repairs: RepairStack, speaker: Speaker) -> None:
    repairs.answer(["a" * 195 + MARKER + "b" * 50])  # cut after 200 characters, inside the marker
    response = speaker.ask(repairs)
    assert MARKER not in response.text
    assert speaker.text(response) == REFUSAL
    assert response.headers["x-fedward-decision"] == "refuse"
    outcome = "still_unsafe" if speaker.name.startswith("tgi") else "only_as_whole"  # without its tokens, too
    assert repairs.last_record()["repairs"] == [{"choice": 0, "action": "redact", "outcome": outcome}]


@by_name
def test_end_of_a_stream_that_is_unsafe_only_with_what_has_left(repairs: RepairStack, speaker: Speaker) -> None:
    repairs.answer(["a" * 195 + MARKER[:5], MARKER[5:] + " and so on"])
    response = speaker.ask(repairs, stream=True)
    assert MARKER not in response.text
    assert MARKER[5:] not in response.text
    assert "[removed]" in text_of(speaker, response)


@openais
@streamed_or_not
def test_each_choice_is_redacted_by_itself(repairs: RepairStack, speaker: Speaker, stream: bool) -> None:
    pieces = [sentences(4), sentences(4, 2)]
    repairs.answer(pieces[0], others=[pieces[1]])
    response = speaker.ask(repairs, stream=stream, n=2)
    assert MARKER not in response.text
    assert [text_of(speaker, response, i) for i in range(2)] == [with_removed(said) for said in pieces]
    if not stream:
        assert note(response)["choices"] == [1]


@openais
def test_worst_choice_names_the_decision(repairs: RepairStack, speaker: Speaker) -> None:
    repairs.answer(sentences(2), others=[["a" * 195 + MARKER], sentences(2, 1)])
    response = speaker.ask(repairs, n=3)
    assert [text_of(speaker, response, i) for i in range(3)] == [
        "".join(sentences(2)), REFUSAL, with_removed(sentences(2, 1))
    ]  # fmt: skip
    assert (note(response)["decision"], note(response)["blocked"], note(response)["choices"]) == (
        "refuse",
        True,
        [1, 2],
    )
    assert response.headers["x-fedward-decision"] == "refuse"


@streamed_or_not
def test_reasoning_is_redacted_like_content(repairs: RepairStack, stream: bool) -> None:
    repairs.answer(sentences(3, 1), reasoning=sentences(3, 0))
    response = CHAT.ask(repairs, stream=stream)
    assert MARKER not in response.text
    said = (
        [part["choices"][0]["delta"] for part in events(response)[:-1]]
        if stream
        else [response.json()["choices"][0]["message"]]
    )
    for channel, bad in (("reasoning_content", 0), ("content", 1)):
        assert "".join(one.get(channel) or "" for one in said) == with_removed(sentences(3, bad))


@streamed_or_not
def test_safe_calls_leave_beside_redacted_content_and_unsafe_ones_do_not(repairs: RepairStack, stream: bool) -> None:
    repairs.answer(sentences(3, 1), calls=[("find", ['{"q": "rivers"}'])])
    response = CHAT.ask(repairs, stream=stream)
    assert MARKER not in response.text
    assert "rivers" in response.text
    assert "[removed]" in response.text
    repairs.answer(sentences(3, 1), calls=[("find", [f'{{"q": "{MARKER}"}}'])])
    response = CHAT.ask(repairs, stream=stream)
    assert MARKER not in response.text
    assert "tool_calls" not in response.text
    assert CHAT.finish_reason(response) == "content_filter"


@pytest.mark.parametrize("speaker", [CHAT, COMPLETIONS, TGI], ids=["chat", "completions", "tgi"])
@streamed_or_not
def test_tokens_are_not_told_once_something_was_removed(repairs: RepairStack, speaker: Speaker, stream: bool) -> None:
    """The third piece reaches over the end of the unsafe sentence: its token would show a part of it."""
    pieces = ["One. ", f"The {MARKER} and", " a secret. T", "hree. ", "Four."]
    repairs.answer(pieces, alternatives=["Uno. ", "El ", " y ", "res. ", "Cuatro."], pause=lambda _: 0.02)
    response = speaker.ask(repairs, stream=stream)
    assert text_of(speaker, response) == "One. [removed] Three. Four."
    assert "secret" not in response.text
    assert "Cuatro" not in response.text


@pytest.mark.parametrize("speaker", [CHAT, COMPLETIONS, TGI], ids=["chat", "completions", "tgi"])
def test_unsafe_alternatives_are_left_out_of_a_whole_answer(repairs: RepairStack, speaker: Speaker) -> None:
    repairs.answer(["One ", "two."], alternatives=["a", MARKER])
    response = speaker.ask(repairs)
    assert text_of(speaker, response) == "One two."
    assert MARKER not in response.text
    assert response.headers["x-fedward-decision"] == "redact"


@pytest.mark.parametrize("pause", [0.0, 0.03])
def test_units_after_a_removal_are_decided_on_with_what_has_left(repairs: RepairStack, pause: float) -> None:
    """Their first checks had the unsafe sentence before them."""
    repairs.answer(sentences(12, 3), pause=lambda _: pause)
    response = CHAT.ask(repairs, stream=True)
    assert text_of(CHAT, response) == with_removed(sentences(12, 3))
    assert len([part for part in events(response)[:-1] if "fedward" in part]) == 1
    last = [item["response"] for body in repairs.safety.requests for item in body["items"] if "response" in item][-1]
    assert last == with_removed(sentences(12, 3)), "the whole of what has left"


@streamed_or_not
def test_check_that_fails_within_a_repair_is_a_refusal(repairs: RepairStack, stream: bool) -> None:
    repairs.answer(sentences(3, 1), pause=by_sentence(1))
    repairs.break_safety("500", "response", text="[removed]")
    response = CHAT.ask(repairs, stream=stream)
    assert response.status_code == 200
    assert MARKER not in response.text
    assert CHAT.finish_reason(response) == "content_filter"
    assert repairs.last_record()["repairs"] == [{"choice": 0, "action": "redact", "outcome": "unavailable"}]
