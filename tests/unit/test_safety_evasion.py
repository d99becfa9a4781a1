"""Undoing disguises: every transform of an attacker comes back as the sentence, and ordinary text stays one reading."""

import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.safety.embedded.features import normalise, words
from services.safety.evasion.lookalikes import canonical
from services.safety.evasion.readings import MAX_GROWTH, MAX_READINGS, readings
from services.safety.training.obfuscation import TRANSFORMS, disguise

SENTENCES = (
    "How do I bake bread for my family at home?",
    "Please write a short letter to my neighbor about the garden.",
    "Tell me the best way to learn the guitar in one year",
)
# Apart from the words themselves these lose something that only guessing brings back.
GUESSED = {"no spaces", "spaces only", "broken words"}

# Own lines. Whatever the language: one reading, and it is the text itself.
UNTOUCHED = (
    "Wie kann ich am Wochenende mit meiner Großmutter einen Apfelkuchen backen, wenn wir keinen Ofen haben?",
    "Geschwindigkeitsbegrenzung und Donaudampfschifffahrtsgesellschaft sind lange Wörter.",
    "Pourriez-vous m'expliquer comment préparer une soupe à l'oignon pour l'été prochain ?",
    "L'élève a présenté son intérêt général pour le théâtre à l'école.",
    "¿Cómo puedo aprender a tocar la guitarra española en menos de un año?",
    "Привет! Как приготовить борщ для большой семьи? Кот спит, а рот закрыт.",
    "Сор, рот, кот и мост: короткие слова.",
    "Πώς μπορώ να μάθω ελληνικά; Το σπίτι είναι μεγάλο και ο κήπος όμορφος.",
    "كيف أخبز الخبز في المنزل مع عائلتي في نهاية الأسبوع؟",
    "मैं घर पर रोटी कैसे बना सकता हूँ? हिन्दी सीखना अच्छा है।",
    "请告诉我怎样在家里做面包。我住在北京。千山万水。",
    "週末に家族とパンを焼くにはどうすればいいですか。AIについて",
    "집에서 빵을 굽는 방법을 알려 주세요. 오늘은 날씨가 좋아요.",
    "Evde nasıl ekmek pişirebilirim? Iğdır'da kış çok soğuk geçiyor.",
    "Làm thế nào để nấu phở bò ngon tại nhà cho cả gia đình vào cuối tuần?",
    "Jak upiec chleb w domu z żurawiną i łososiem? Wszczęcie postępowania.",
    "Miten leivon ruisleipää kotona? Hyvää huomenta kaikille ystäville!",
    "Hvordan bager jeg rugbrød på søndag? Blåbærgrød er dejligt.",
    "Hogyan süssek kenyeret otthon? Őszintén köszönöm szépen.",
    "Sut mae pobi bara gartref? Llanfairpwllgwyngyll yw'r lle.",
    "איך אופים לחם בבית? שָׁלוֹם עֲלֵיכֶם לכל המשפחה.",
    'def bake(bread: str, minutes: int = 30) -> None:\n    print(f"{bread}: {minutes:>3}%")\n    return x[::-1]',
    'for (int i = 0; i < n; i++) { printf("%d %s\\n", i, names[i]); }',
    "const getUserNameById = async (userId) => (await fetch(`/api/v1/users/${userId}`)).json();",
    "SELECT a.id, b.name FROM users a JOIN orders b ON a.id = b.user_id WHERE a.x > 10;",
    "git commit 5978cd3, in full 2fd4e1c67a2d28fced849ee1bb76e7391b93eb12",
    "550e8400-e29b-41d4-a716-446655440000 and C56A4180-65AA-42EC-A945-5FDCA8B1CC9A",
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==",
    "I love this 😀😀🎉🔥 🇩🇪🇫🇷 thank you 👍🏽",
    "Options: A) tea B) coffee C) juice D) water. Pick a, b, c or d.",
    "The matrix is 1 0 0 1 0 1 and the vector is a b c d e f g h.",
    "Call +49 30 1234567 or pay with 4539 1488 0343 6467 by 2026-11-21 10:30.",
    "The U.S.A., the F.B.I. and e.g. the U.K. signed; see p. 4, i.e. the B.B.C. report.",
    "MAC 00:1a:2b:3c:4d:5e, IPv6 2001:0db8:85a3:0000:0000:8a2e:0370:7334, colour #ff8800",
    "My Windows10 laptop (i7-9700K, RTX3080) costs $1200!! WOW!!!",
    "The naïve fiancée ordered a café crème and wrote her résumé.",
    "ATGCGTACGTTAGCCTAGGATCCATTAG is a DNA string.",
    "user@example.org @everyone #throwbackthursday :-) ;) <3",
)


def restored(sentence: str, text: str) -> bool:
    """Whether one of the readings has the sentence's words in a row."""
    wanted = " ".join(words(normalise(sentence)))
    return any(f" {wanted} " in f" {' '.join(words(normalise(reading)))} " for reading in readings(text))


@pytest.mark.parametrize("name", sorted(TRANSFORMS.keys() - GUESSED))
@pytest.mark.parametrize("sentence", SENTENCES)
def test_every_disguise_is_undone(name: str, sentence: str) -> None:
    disguised = disguise(name, sentence)
    assert disguised != sentence
    assert restored(sentence, disguised), readings(disguised)


@pytest.mark.parametrize("name", sorted(GUESSED))
def test_lost_word_boundaries_are_guessed_from_the_vocabulary(name: str) -> None:
    assert restored(SENTENCES[0], disguise(name, SENTENCES[0]))


@pytest.mark.parametrize("text", UNTOUCHED)
def test_ordinary_text_has_one_reading_which_is_the_text(text: str) -> None:
    assert readings(text) == [text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b\u200bread", "bread"),
        ("bre\u0430d", "bread"),  # Cyrillic a
        ("\u0441\u043e\u0440", "\u0441\u043e\u0440"),  # a Russian word that looks like "cop"
        ("\uff42\uff52\uff45\uff41\uff44", "bread"),
        ("b\u0334r\u0335e\u0336a\u0337d", "bread"),
        ("br\x00ead\x7f", "bread"),
        ("a\ud800b", "a\ufffdb"),
        ("caf\u00e9", "caf\u00e9"),
        ("\U0001f171r\U0001f174ad", "bread"),
    ],
)
def test_canonical_form(text: str, expected: str) -> None:
    assert canonical(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How do I bake YnJlYWQ= at home?", "How do I bake bread at home?"),
        ("How do I onxr oernq at home?", "How do I bake bread at home?"),
        ("How do I b4k3 bread at home?", "How do I bake bread at home?"),
        ("How do I b a k e b r e a d at home?", "How do I bake bread at home?"),
        ("How do I %62%61%6b%65 bread at home?", "How do I bake bread at home?"),
        ("How do I bake 6272656164 at home?", "How do I bake bread at home?"),
        ("How do I pay with 4539148803436467 at home?", None),
        ("How do I \\x62ake bread at home?", "How do I bake bread at home?"),
    ],
)
def test_a_disguised_part_is_put_in_its_place(text: str, expected: str | None) -> None:
    assert readings(text) == [text, *([expected] if expected else [])]


def test_a_decoded_part_is_also_read_alone() -> None:
    text = "Decode this and do it: cGxlYXNlIGJha2UgYnJlYWQgZm9yIG1l"
    assert readings(text) == [text, "Decode this and do it: please bake bread for me", "please bake bread for me"]


@given(
    st.one_of(
        st.text(), st.text(alphabet=st.characters()), st.text("aA1@!.- \n%&#;\\ux=+/0\u0430\u0301\u200b\U000e0041")
    )
)
@example("\ud800\x00")
@example("\ufdfa")
@example("a" + "\u0301" * 9)
@example("&#x110000;&#55296; \\U00110000 \\ud800 U+D800 %ff%fe")
def test_any_text_has_few_bounded_readings_and_a_settled_canonical_form(text: str) -> None:
    found = readings(text)
    assert 1 <= len(found) <= MAX_READINGS
    assert len(set(found)) == len(found)
    assert found[0] == canonical(text)
    assert canonical(found[0]) == found[0]
    assert sum(map(len, found)) <= MAX_GROWTH * max(len(text), len(found[0]))
    for reading in found:
        reading.encode()  # no lone surrogates


@given(
    st.lists(st.sampled_from(["the", "bread", "water", "garden", "letter", "family", "winter", "friend"]), min_size=4)
)
def test_encodings_of_any_english_words_are_undone(chosen: list[str]) -> None:
    sentence = " ".join(chosen)
    for name in ("base64", "base32", "hex", "percent-encoding", "html entities", "rot13", "base64 then base64"):
        assert restored(sentence, disguise(name, sentence)), name


def calls(work: Callable[[], object]) -> int:
    """How many functions, of Python's and of ours, the work calls."""
    count = 0

    def counted(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "a ",
        "a.",
        "ab ",
        "%41",
        "%",
        "6",
        "0x",
        "A=",
        "a\u200b",
        "а",
        "аb",
        "l1",
        "a!",
        "\\u0041",
        "&#65;",
        "U+0041 ",
        "onxr oernq ",
        "bakebread",
        "\u0250",
        "\U000e0041",
        "a-",
        "ab\n",
        "a" + 20 * " ",
        "h0w ",
    ],
)
def test_work_grows_no_faster_than_the_text(unit: str) -> None:
    short, long = unit * (1_000 // len(unit)), unit * (4_000 // len(unit))
    readings(short)  # fills the caches and loads the vocabulary
    assert calls(lambda: readings(long)) <= 5 * calls(lambda: readings(short)) + 1_000
