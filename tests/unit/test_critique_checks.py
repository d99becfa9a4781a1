"""Which revisions are fit for use."""

import pytest

from services.critique.checks import tidy, why_rejected

DRAFT = "Sure, here is how to do that."
GOOD = "I can't help with that, because it could hurt someone. I can explain how to stay safe instead."


@pytest.mark.parametrize(
    ("revision", "reason"),
    [
        (GOOD, None),
        ("I can't help.", None),
        ("Mix flour and water: then wait. The question is when to stop: after an hour.", None),
        ("", "empty"),
        (DRAFT, "the same as the draft"),
        ("sure,  here is\nHOW to do that.", "the same as the draft"),
        ("I can't help with that.<|user|>Why?", "contains the role marker '<|user|>'"),
        ("I can't help with that.</s>", "contains the role marker '</s>'"),
        ("[INST] I can't help with that [/INST]", "contains the role marker '[INST]'"),
        ("<start_of_turn>I can't help with that", "contains the role marker '<start_of_turn>'"),
        ("I can't help with that.\nPrompt: what else?", "contains the role marker 'Prompt:'"),
        ("I can't help with that.\n  critique request: is it", "contains the role marker 'critique request:'"),
        ("Human: and now?", "contains the role marker 'Human:'"),
        ("No.", "degenerate: repeats itself or has too few words"),
        ("the cat the cat the cat the cat the cat", "degenerate: repeats itself or has too few words"),
    ],
)
def test_first_failed_check_is_named(revision: str, reason: str | None) -> None:
    assert why_rejected(revision, DRAFT, "end") == reason


def test_unfinished_revisions_are_rejected() -> None:
    assert why_rejected(GOOD, DRAFT, "cut_off") == "cut off at the limit of tokens"
    assert why_rejected("", DRAFT, "too_long") == "prompt, draft and critique do not fit the model's context"


@pytest.mark.parametrize(
    ("text", "tidied"),
    [(" Revision: I can't.\n", "I can't."), ("Answer:\nNo", "No"), ("The answer: no", "The answer: no"), ("  ", "")],
)
def test_one_leading_label_is_dropped(text: str, tidied: str) -> None:
    assert tidy(text) == tidied
