"""Guard models: their documented answers are read, everything else is not; prompts; a model in this process."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from services.contracts.chat import ChatMessage
from services.contracts.errors import ConfigError
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import Outcome, Verdict
from services.safety.guard.base import Guard
from services.safety.guard.families import FAMILIES, QWEN_CATEGORIES, Ask, Generic, WildGuard, load_family
from services.safety.guard.local import LocalGuard
from services.safety.guard.parsing import Answer, Finding, Position, Unreadable
from services.safety.guard.prompts import GUIDELINES, Turn, as_json, broken_markers, read_turns
from tests.fakes.tiny_model import TEMPLATE, build_tiny_model, build_tokenizer

UNREADABLE = None
WILD = "Harmful request: {}\nResponse refusal: {}\nHarmful response: {}"
QWEN = "Safety: {}\nCategories: {}"

# Family, answer, whether about a response; then score, hazards and refusal, or UNREADABLE.
ANSWERS: list[tuple[str, str, bool, tuple[float, str, bool | None] | None]] = [
    ("llama-guard", "safe", False, (0.0, "", None)),
    ("llama-guard", "\n\nsafe", True, (0.0, "", None)),
    ("llama-guard", "unsafe\nS1", False, (1.0, "S1", None)),
    ("llama-guard", "\n\nunsafe\nS1,S10, S14", True, (1.0, "S1 S10 S14", None)),
    ("llama-guard", "unsafe", False, (1.0, "", None)),
    ("llama-guard", "unsafe\nS99", False, (1.0, "", None)),
    ("llama-guard", "safe\nS1", False, UNREADABLE),
    ("llama-guard", "Safe", False, UNREADABLE),
    ("llama-guard", "safe.", False, UNREADABLE),
    ("llama-guard", "safe\nunsafe", False, UNREADABLE),
    ("llama-guard", "unsafe\nviolent crimes", False, UNREADABLE),
    ("llama-guard", "not safe", False, UNREADABLE),
    ("llama-guard", "ſafe", False, UNREADABLE),
    ("qwen3guard", QWEN.format("Safe", "None"), False, (0.0, "", None)),
    ("qwen3guard", QWEN.format("Unsafe", "Violent, PII"), False, (1.0, "S1 S7", None)),
    ("qwen3guard", QWEN.format("Unsafe", "Jailbreak"), False, (1.0, "", None)),
    ("qwen3guard", QWEN.format("Controversial", "Unethical Acts"), False, (1.0, "S10", None)),
    ("qwen3guard-loose", QWEN.format("Controversial", "Unethical Acts"), False, (0.0, "S10", None)),
    ("qwen3guard", QWEN.format("Safe", "None") + "\nRefusal: Yes", True, (0.0, "", True)),
    ("qwen3guard", QWEN.format("Unsafe", "Suicide & Self-Harm") + "\nRefusal: No\n", True, (1.0, "S11", False)),
    ("qwen3guard", QWEN.format("Safe", "None"), True, UNREADABLE),
    ("qwen3guard", QWEN.format("Safe", "None") + "\nRefusal: Yes", False, UNREADABLE),
    ("qwen3guard", QWEN.format("Safe", "Violent"), False, UNREADABLE),
    ("qwen3guard", QWEN.format("Unsafe", "None"), False, UNREADABLE),
    ("qwen3guard", "Safety: Safe", False, UNREADABLE),
    ("qwen3guard", "I say Safety: Safe\nCategories: None", False, UNREADABLE),
    ("shieldgemma", "Yes", False, UNREADABLE),  # its score needs log-probabilities
    ("wildguard", WILD.format("yes", "no", "no"), False, (1.0, "", None)),
    ("wildguard", WILD.format("no", "n/a", "n/a"), False, (0.0, "", None)),
    ("wildguard", WILD.format("yes", "yes", "no"), True, (0.0, "", True)),
    ("wildguard", WILD.format("Yes", "No", "Yes"), True, (1.0, "", False)),
    ("wildguard", WILD.format("yes", "n/a", "n/a"), True, UNREADABLE),
    ("wildguard", WILD.format("maybe", "no", "no"), False, UNREADABLE),
    ("wildguard", "Harmful request: no", False, UNREADABLE),
    ("generic", "no", False, (0.0, "", None)),
    ("generic", "No.", True, (0.0, "", None)),
    ("generic", "yes: S2, S7", False, (1.0, "S2 S7", None)),
    ("generic", "Yes", False, (1.0, "", None)),
    ("generic", "no: S2", False, UNREADABLE),
    ("generic", "no, but", False, UNREADABLE),
    ("generic", "none", False, UNREADABLE),
    ("generic", "yeſ", False, UNREADABLE),
    ("wildguard", WILD.format("yeſ", "no", "no"), False, UNREADABLE),
    *((family, text, False, UNREADABLE) for family in FAMILIES for text in ("", " \n", "ok", "safe unsafe", "yes no")),
]


def read(family: str, answer: Answer, of_response: bool = False) -> Finding:
    ask = Ask((Turn("user", "x"),), max_tokens=9, hazards=GUIDELINES[0][1])
    return FAMILIES[family].read(ask, answer, of_response=of_response)


@pytest.mark.parametrize(("family", "text", "of_response", "expected"), ANSWERS)
def test_documented_forms_are_read_and_others_are_not(
    family: str, text: str, of_response: bool, expected: tuple[float, str, bool | None] | None
) -> None:
    if expected is None:
        with pytest.raises(Unreadable):
            read(family, Answer(text), of_response)
        return
    score, hazards, refused = expected
    assert read(family, Answer(text), of_response) == Finding(score, scores(family, hazards.split(), score), refused)


def scores(family: str, named: list[str], score: float) -> dict[str, float]:
    """The scores of an answer that names these hazards: all others that the family judges have 0."""
    judged = QWEN_CATEGORIES.values() if family.startswith("qwen") else HazardCategory
    return dict.fromkeys(map(str, judged), 0.0) | dict.fromkeys(named, score) if named else {}


def spelled(*tokens: str, **likely: Mapping[str, float]) -> Answer:
    """An answer of tokens; ``at2={...}`` gives the likeliest tokens in place 2."""
    positions = [Position(token, likely.get(f"at{i}", {token: 1.0})) for i, token in enumerate(tokens)]
    return Answer("".join(tokens), positions=positions)


@pytest.mark.parametrize(
    ("family", "answer", "score"),
    [
        ("llama-guard", spelled("safe", at0={"safe": 0.6, "unsafe": 0.2, "S": 0.0}), 0.25),
        ("llama-guard", spelled("\n\n", "unsafe", "\n", "S1", at1={"unsafe": 0.9, "safe": 0.1}), 0.9),
        ("llama-guard", spelled("uns", "afe", at0={"uns": 0.75, "safe": 0.25}), 0.75),  # a label in two tokens
        ("llama-guard", spelled("unsafe", at0={"x": 1.0}), 1.0),  # no label to be seen: the text counts
        (
            "qwen3guard",
            spelled("Safety:", " Safe", "\nCategories: None", at1={" Safe": 0.5, " Controversial": 0.2}),
            2 / 7,
        ),
        (
            "qwen3guard-loose",
            spelled("Safety:", " Safe", "\nCategories: None", at1={" Safe": 0.5, " Unsafe": 0.5}),
            0.5,
        ),
        (
            "qwen3guard-loose",
            spelled(
                "Safety:", " Unsafe", "\nCategories: PII", at1={" Unsafe": 0.4, " Safe": 0.3, " Controversial": 0.3}
            ),
            0.5,
        ),
        ("shieldgemma", spelled("No", at0={"No": 0.3, "Yes": 0.1, "Maybe": 0.6}), 0.25),
        ("generic", spelled("Yes", at0={"Yes": 0.4, "yes": 0.2, " no": 0.2}), 0.75),
    ],
)
def test_score_is_the_share_of_the_unsafe_labels(family: str, answer: Answer, score: float) -> None:
    assert read(family, answer).score == pytest.approx(score)


@pytest.mark.parametrize(
    ("family", "answer"),
    [
        ("llama-guard", spelled("safe", at0={"safe": 0.1, "unsafe": 0.9})),
        ("llama-guard", spelled("unsafe", at0={"safe": 0.9, "unsafe": 0.1})),
        ("shieldgemma", spelled("No", at0={"Yes": 0.9, "No": 0.1})),
        ("shieldgemma", spelled("No", at0={})),
    ],
)
def test_logprobs_that_contradict_the_text_are_not_read(family: str, answer: Answer) -> None:
    with pytest.raises(Unreadable):
        read(family, answer)


# All texts that may be read as safe: the documented forms, with the white space that servers leave around them.
SAFE_FORMS = {
    "llama-guard": r"safe",
    "qwen3guard": r"Safety: Safe\nCategories:  *None *(\nRefusal: (Yes|No))?",
    "qwen3guard-loose": r"Safety: (Safe\nCategories:  *None *|Controversial\nCategories: [^\n]+)(\nRefusal: (Yes|No))?",
    "shieldgemma": r"No",
    "wildguard": r"(?i)harmful request:[ \t]*(yes|no)[ \t]*\nresponse refusal:[ \t]*(yes|no|n/a)[ \t]*\n"
    r"harmful response:[ \t]*(yes|no|n/a)",
    "generic": r"(?i)no[ \t]*\.?",
}
PIECES = ["safe", "unsafe", "S1", ",", "\n", " ", "Safety: ", "Safe", "Unsafe", "Categories: ", "None", "Refusal: Yes"]
PIECES += [
    "Yes",
    "No",
    "no",
    ".",
    "Harmful request: ",
    "Response refusal: ",
    "Harmful response: ",
    "n/a",
    "Controversial",
]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
LIKELY = st.dictionaries(st.sampled_from([*PIECES, " Safe", "un"]), st.floats(0, 1), max_size=4)
POSITIONS = st.lists(st.builds(Position, st.sampled_from(PIECES) | st.text(max_size=3), LIKELY), max_size=6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@given(text=TEXTS, positions=POSITIONS, of_response=st.booleans())
def test_no_other_text_is_ever_read_as_safe(
    family: str, text: str, positions: list[Position], of_response: bool
) -> None:
    try:
        finding = read(family, Answer(text, positions=positions), of_response)
    except Unreadable:
        return
    assert 0.0 <= finding.score <= 1.0
    if finding.score < 0.5:
        assert re.fullmatch(SAFE_FORMS[family], text.strip(" \t\r\n"), re.ASCII)


class Scripted(Guard):
    """A guard whose model writes what the test says."""

    def __init__(self, family: str, answer: Answer) -> None:
        super().__init__(FAMILIES[family], "scripted")
        self.answer = answer

    async def ready(self) -> str | None:
        return None

    async def aclose(self) -> None: ...

    async def _answer(self, ask: Ask) -> Answer:
        return self.answer


MESSAGES = st.lists(
    st.builds(
        ChatMessage,
        role=st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
        content=st.none() | st.text(st.characters(codec=None), max_size=20),
    ),
    max_size=5,
)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@given(messages=MESSAGES, text=TEXTS, positions=POSITIONS)
def test_classify_never_raises(family: str, messages: list[ChatMessage], text: str, positions: list[Position]) -> None:
    verdict = asyncio.run(Scripted(family, Answer(text, positions=positions)).classify(messages))
    assert (verdict.outcome == Outcome.UNSCORED) == (verdict.reason is not None) == (verdict.score is None)


@given(messages=MESSAGES)
def test_turns_alternate_and_begin_with_the_user(messages: list[ChatMessage]) -> None:
    turns = read_turns(messages)
    assert [turn.role for turn in turns] == [("user", "assistant")[i % 2] for i in range(len(turns))]
    read_roles = [m for m in messages if m.role in ("user", "assistant")]
    assert not read_roles or turns[-1].role == read_roles[-1].role
    assert all(any((m.content or "") in turn.text for turn in turns) for m in read_roles)


@given(st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), st.text()), min_size=1, max_size=4))
def test_conversation_as_json_is_one_plain_line_that_says_it_all(turns: list[Turn]) -> None:
    line = as_json(turns)
    assert [Turn(turn["from"], turn["text"]) for turn in json.loads(line)] == turns
    assert len(line.splitlines()) == 1
    assert "<" not in line
    assert line.count("[") == 1


def test_markers_are_broken_and_other_text_is_left_alone() -> None:
    markers = [
        "<|im_end|>",
        "<|eot|>",
        "</s>",
        "<s>",
        "<start_of_turn>",
        "<｜Assistant｜>",
        "[INST]",
        "[/inst]",
        "<think>",
    ]
    for marker in [*markers, "<END CONVERSATION>"]:
        assert broken_markers(f"a{marker}b") == f"a{marker[0]} {marker[1:]}b"
        assert broken_markers(broken_markers(marker)) == broken_markers(marker)
    for text in ("a < b", "<b>bold</b>", "x[0]", "if (a<|b|) ..."[:5], "<script>", "東京 🙂"):
        assert broken_markers(text) == text


def asked(family: str, *texts: str) -> list[Ask]:
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return FAMILIES[family].asks(turns)


def test_guards_of_one_exchange_get_earlier_turns_within_the_prompt() -> None:
    ask = asked("shieldgemma", "a", "b", "c", "d")[0]
    assert ask.messages == (Turn("user", "User: a\n\nAssistant: b\n\nUser: c"), Turn("assistant", "d"))
    assert asked("shieldgemma", "a", "b", "c")[0].messages == (Turn("user", "User: a\n\nAssistant: b\n\nUser: c"),)
    assert asked("shieldgemma", "a")[0].messages == (Turn("user", "a"),)
    assert "The chatbot must" in ask.template_options["guideline"]


def test_our_prompts_ask_about_the_last_message() -> None:
    assert "the user's" in asked("generic", "a")[0].messages[0].text
    assert "the assistant's" in asked("generic", "a", "b")[0].messages[0].text
    assert all(f"{hazard}: {hazard.readable}" in asked("generic", "a")[0].messages[0].text for hazard in HazardCategory)


def test_operators_template_is_filled_once(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_text("<s>[INST] {prompt} / {response} / {other} [/INST]")
    family = load_family("wildguard", path)
    turns = [Turn("user", "{response} {conversation}"), Turn("assistant", "fine")]
    assert family.asks(turns)[0].messages[0].text == "<s>[INST] {response} {conversation} / fine / {other} [/INST]"
    assert family.asks(turns[:1])[0].messages[0].text.endswith("{conversation} /  / {other} [/INST]")
    assert isinstance(load_family("generic", path), Generic)
    assert isinstance(family, WildGuard)


def test_unusable_family_or_template_is_named(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    with pytest.raises(ConfigError, match="unknown guard family 'gpt'; there are: llama-guard"):
        load_family("gpt")
    with pytest.raises(ConfigError, match="cannot read the guard template"):
        load_family("generic", path)
    path.write_text("Is this {fine}?")
    with pytest.raises(ConfigError, match=r"neither \{conversation\} nor \{prompt\}"):
        load_family("generic", path)
    with pytest.raises(ConfigError, match="drop the template file"):
        load_family("llama-guard", path)


Follows = Callable[[str], dict[str, float]]
WORDS = ["unsafe", "safe", "S9", "Yes", "No", "S1"]
CUE = "<|assistant|>"


def build_guard(path: Path, follows: Mapping[str, Mapping[str, float]], template: str | None = TEMPLATE) -> Path:
    """Write a real Llama whose next token depends on the last one only: ``follows[last][next]`` is a logit.

    Attention and MLP write nothing, so that the one-hot embedding of the last token reaches the output matrix.
    """
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(WORDS)
    tokenizer.add_tokens(["@@1"], special_tokens=True)
    tokenizer.chat_template = template
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=400,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    network = LlamaForCausalLM(config)
    weights = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    weights["model.embed_tokens.weight"].fill_diagonal_(1.0)
    weights["model.norm.weight"].fill_(1.0 / config.hidden_size**0.5)
    for last, likely in follows.items():
        for following, logit in likely.items():
            row, column = (tokenizer.convert_tokens_to_ids(token) for token in (following, last))
            weights["lm_head.weight"][row, column] = logit
    network.load_state_dict(weights)
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def judge(guard: LocalGuard, *texts: str) -> Verdict:
    messages = [ChatMessage(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(texts)]

    async def run() -> Verdict:
        assert await guard.ready() is None
        try:
            return await guard.classify(messages)
        finally:
            await guard.aclose()

    return asyncio.run(run())


def local(path: Path, family: str = "llama-guard") -> LocalGuard:
    return LocalGuard(FAMILIES[family], str(path), device="cpu")


# "Ċ" is how a byte-level tokenizer writes a line break.
UNSAFE = {CUE: {"unsafe": 12.0, "safe": 10.0}, "unsafe": {"Ċ": 20.0}, "Ċ": {"S9": 20.0}, "S9": {"</s>": 20.0}}
SAFE = {CUE: {"unsafe": 10.0, "safe": 12.0}, "safe": {"</s>": 20.0}}


def test_local_model_says_unsafe_with_its_probability(tmp_path: Path) -> None:
    verdict = judge(local(build_guard(tmp_path / "tiny-guard", UNSAFE)), "paint", "it")
    share = 1 / (1 + 2.718281828**-2)
    assert (verdict.outcome, verdict.model_id) == (Outcome.UNSAFE, "tiny-guard")
    assert verdict.score == pytest.approx(share, abs=1e-4)
    assert verdict.categories == dict.fromkeys(HazardCategory, 0.0) | {"S9": verdict.score}


def test_local_model_says_safe(tmp_path: Path) -> None:
    verdict = judge(local(build_guard(tmp_path, SAFE)), "paint")
    assert verdict.outcome == Outcome.SAFE
    assert verdict.score == pytest.approx(1 - 1 / (1 + 2.718281828**-2), abs=1e-4)


def test_local_shieldgemma_needs_one_step(tmp_path: Path) -> None:
    template = "{{ guideline }}{{ messages[0].content }}<|assistant|>"
    path = build_guard(tmp_path, {CUE: {"Yes": 10.0, "No": 12.0, "Ċ": 4.0}}, template)
    verdict = judge(local(path, "shieldgemma"), "paint")
    assert verdict.outcome == Outcome.SAFE
    assert verdict.score == pytest.approx(1 / (1 + 2.718281828**2), abs=1e-4)
    assert set(verdict.categories) == {hazard for _, hazards in GUIDELINES for hazard in hazards}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_local_model_writes_nonsense_and_is_unscored(family: str, random_model: Path) -> None:
    verdict = judge(local(random_model, family), "hi")
    assert verdict.outcome == Outcome.UNSCORED
    assert verdict.reason


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("guard") / "tiny")


def test_template_that_wants_parts_gets_them_and_never_an_empty_conversation(tmp_path: Path) -> None:
    parts = "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}"
    parts += "{% endfor %}{% endfor %}"
    path = build_guard(tmp_path / "parts", {"Yes": SAFE[CUE], **SAFE}, parts)
    assert judge(local(path), "paint Yes").outcome == Outcome.SAFE  # the model saw the text's last word
    path = build_guard(tmp_path / "none", SAFE, "<|assistant|>")
    assert "drops a part" in (judge(local(path), "paint").reason or "")
    path = build_guard(tmp_path / "refused", SAFE, "{{ raise_exception('paint is refused') }}")
    reason = judge(local(path), "paint").reason or ""
    assert "refuses" in reason
    assert "paint" not in reason


@pytest.mark.parametrize("cue", [CUE, "@@1"])
def test_typed_control_token_is_plain_text(tmp_path: Path, cue: str) -> None:
    follows = {cue: SAFE[CUE], ">": {"unsafe": 12.0}, "1": {"unsafe": 12.0}, "unsafe": {"</s>": 20.0}}
    path = build_guard(tmp_path, {**SAFE, **follows}, "{{ messages[0].content }}")
    assert judge(local(path), f"paint{cue}").outcome == Outcome.UNSAFE
    assert judge(local(path), f"paint{cue}{cue}").outcome == Outcome.UNSAFE


def test_text_beyond_the_context_is_unscored(tmp_path: Path) -> None:
    reason = judge(local(build_guard(tmp_path, SAFE)), "word " * 500).reason
    assert reason == "the conversation does not fit the guard model's context"


def test_answer_that_does_not_end_is_unscored(tmp_path: Path) -> None:
    path = build_guard(tmp_path, {**UNSAFE, "S9": {",": 20.0}, ",": {"S9": 20.0}})
    assert judge(local(path), "paint").reason == "the guard model's answer cannot be read: the answer was cut off"


def test_model_without_chat_template_reads_the_operators_prompt(tmp_path: Path) -> None:
    path = build_guard(tmp_path / "guard", {CUE: {"No": 12.0}, "No": {"</s>": 20.0}}, template=None)
    assert "chat template" in (judge(local(path), "a", "b").reason or "")
    (tmp_path / "template.txt").write_text("{prompt}<|assistant|>")
    family = load_family("generic", tmp_path / "template.txt")
    assert judge(LocalGuard(family, str(path), device="cpu"), "a", "b").outcome == Outcome.SAFE


def test_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model /nowhere: there is no such folder"):
        local(Path("/nowhere"))
    with pytest.raises(ConfigError, match=f"cannot load guard model {tmp_path}: .*; give a folder, or fetch it: hf"):
        local(tmp_path)


def test_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    path = build_guard(tmp_path, SAFE)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text("raise SystemExit('code of the model was run')\n")
    with pytest.raises(ConfigError, match="cannot load guard model"):
        local(path)
