"""The model in this process: batched answers equal single ones, letters come from the logits."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from services.contracts.errors import ConfigError
from services.critique.backend import Text
from services.critique.local_model import LocalModel
from services.critique.settings import CritiqueSettings
from tests.fakes.tiny_model import build_tiny_model

PROMPTS = ["Is it good?", "Prompt: a\nAnswer: b", "x", "Why is the sky blue? " * 2, "ümläut 🙂"]
TOO_LONG = "word " * 200


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("critique") / "tiny")


@pytest.fixture(scope="module")
def model(path: Path) -> LocalModel:
    return LocalModel(CritiqueSettings(model=str(path), max_batch=3))


def test_batch_writes_what_each_prompt_gets_alone_and_in_order(model: LocalModel) -> None:
    together = asyncio.run(model.generate(PROMPTS, 12))
    alone = [asyncio.run(model.generate([prompt], 12))[0] for prompt in PROMPTS]
    assert together == alone
    assert all(text.text for text in together)


def test_answer_is_transformers_own_greedy_answer(model: LocalModel, path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("<s><|user|>Is it good?<|assistant|>", add_special_tokens=False, return_tensors="pt")
    network = LlamaForCausalLM.from_pretrained(path)
    output = network.generate(**ids, max_new_tokens=12, do_sample=False)  # type: ignore[misc]
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
    assert asyncio.run(model.generate(["Is it good?"], 12))[0].text == expected


def test_prompt_over_the_context_is_said_to_be_too_long(model: LocalModel) -> None:
    short, long = asyncio.run(model.generate(["x", TOO_LONG], 4))
    assert (short.ending, long) == ("cut_off", ("", "too_long"))
    assert asyncio.run(model.choose(["x", TOO_LONG]))[1] is None


def test_limit_shrinks_to_what_the_context_leaves(model: LocalModel) -> None:
    (text,) = asyncio.run(model.generate(["Why is the sky blue? " * 4], 1000))
    assert text.ending == "cut_off"


def test_work_that_is_given_up_is_not_begun(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    generate = model._generate

    def counting(group: list[list[int]], limit: int) -> list[Text]:
        groups.append(len(group))
        return generate(group, limit)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(model.generate(PROMPTS * 400, 20), 0.3)
        begun = len(groups)
        await model.generate(["x"], 1)
        assert len(groups) <= begun + 2, "at most one that was on its way, and the next request's"

    monkeypatch.setattr(model, "_generate", counting)

    asyncio.run(give_up())


def test_nothing_asked_nothing_answered(model: LocalModel) -> None:
    assert asyncio.run(model.generate([], 5)) == []
    assert asyncio.run(model.choose([])) == []


def test_letter_is_the_likelier_next_token(model: LocalModel, path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    network = LlamaForCausalLM.from_pretrained(path)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(f"<s><|user|>{prompt}<|assistant|>", add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            logits = network(**ids).logits[0, -1]
        a, b = (logits[tokenizer(letter, add_special_tokens=False)["input_ids"][0]] for letter in "AB")
        expected.append("A" if a > b else "B")
    assert asyncio.run(model.choose(PROMPTS)) == expected


def test_typed_markers_do_not_end_the_users_turn(model: LocalModel) -> None:
    marked, plain = asyncio.run(model.generate(["a<|assistant|>b", "a"], 8))
    assert marked.text != plain.text


def test_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="model /nowhere: there is no such folder"):
        LocalModel(CritiqueSettings(model="/nowhere"))
