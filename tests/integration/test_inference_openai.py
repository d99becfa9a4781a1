"""OpenAI's protocols in detail: completions and their scores, log-probabilities, and fields that are not acted on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM

from services.contracts.chat import Completion
from services.inference import batch
from tests.fakes.model_servers import serving_inference
from tests.fakes.tiny_model import build_tiny_model

ASK: list[Any] = [{"role": "user", "content": "How do I bake bread?"}]
TEXT = "Why is the sky blue? Because of 東京 and naïve café 🙂."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("openai") / "tiny")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with serving_inference(model) as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    network: Any = LlamaForCausalLM.from_pretrained(model)
    return network.eval()


def plain_logprobs(reference: Any, ids: list[int]) -> torch.Tensor:
    """Row i: the log-probabilities of what follows token i, by one forward pass of transformers."""
    with torch.inference_mode():
        logprobs: torch.Tensor = torch.log_softmax(reference(input_ids=torch.tensor([ids])).logits[0], dim=-1)
    return logprobs


# Completions


def test_prompt_is_scored_as_a_plain_forward_pass_scores_it(
    client: openai.OpenAI, reference: Any, tokenizer: Any
) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    wanted = plain_logprobs(reference, ids)
    answer = client.completions.create(model="tiny", prompt=TEXT, echo=True, logprobs=3, max_tokens=0)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    logprobs: Any = choice.logprobs.token_logprobs
    tops: Any = choice.logprobs.top_logprobs
    names: Any = choice.logprobs.tokens
    offsets = choice.logprobs.text_offset
    assert offsets is not None
    assert (choice.text, choice.finish_reason, len(logprobs)) == (TEXT, "length", len(ids))
    assert (logprobs[0], tops[0]) == (None, None)
    scored = [wanted[place - 1, token].item() for place, token in enumerate(ids) if place]
    assert logprobs[1:] == pytest.approx(scored, abs=1e-4)
    for place in range(1, len(ids)):
        best = wanted[place - 1].topk(3).values.tolist()
        assert sorted(tops[place].values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)
        assert tops[place][names[place]] == logprobs[place]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)
    # Each token stands at its place, and what has no text of its own is part of the character that follows.
    ends = [*offsets[1:], len(TEXT)]
    assert "".join(TEXT[start:end] for start, end in zip(offsets, ends, strict=True)) == TEXT
    assert all(TEXT[s:e] == name for s, e, name in zip(offsets, ends, names, strict=True) if "bytes:" not in name)
    assert any(name.startswith("bytes:\\x") for name in names)


def test_harness_scores_token_ids_in_one_batch(client: openai.OpenAI, reference: Any, tokenizer: Any) -> None:
    """As lm-evaluation-harness does: ids of context and continuation, echo, logprobs 1, one token that is dropped."""
    pairs = [("How do I bake", " bread?"), ("Why is the sky", " blue? Because"), ("A", " or B?")]
    encoded = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in pairs]
    whole = [context + continuation for context, continuation in encoded]
    answer = client.completions.create(model="tiny", prompt=whole, echo=True, logprobs=1, max_tokens=1, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice, (context, _), ids in zip(answer.choices, encoded, whole, strict=True):
        assert choice.logprobs is not None
        found = (choice.logprobs.token_logprobs or [])[len(context) : -1]
        plain = plain_logprobs(reference, ids)
        places = range(len(context), len(ids))
        assert sum(found) == pytest.approx(sum(plain[p - 1, ids[p]].item() for p in places), abs=1e-3)
        tops = (choice.logprobs.top_logprobs or [])[len(context) : -1]
        greedy = [logprob == max(top.values()) for logprob, top in zip(found, tops, strict=True)]
        assert greedy == [int(plain[p - 1].argmax()) == ids[p] for p in places]
        assert choice.text.startswith(tokenizer.decode(ids))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (sum(map(len, whole)), 3)


def test_prompt_of_one_token_has_nothing_to_score(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": [70], "max_tokens": 1, "echo": True}
    logprobs = client.completions.create(**options, logprobs=5).choices[0].logprobs
    assert logprobs is not None
    assert [entry is None for entry in logprobs.token_logprobs or []] == [True, False]
    assert [entry is None for entry in logprobs.top_logprobs or []] == [True, False]


def test_long_prompt_is_scored_in_parts_alike(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    def scores() -> list[float]:
        answer = client.completions.create(model="tiny", prompt=TEXT, echo=True, logprobs=0, max_tokens=4)
        assert answer.choices[0].logprobs is not None
        return (answer.choices[0].logprobs.token_logprobs or [])[1:]

    at_once = scores()
    monkeypatch.setattr(batch, "SCORED_LOGITS", 7 * len(tokenizer))
    assert scores() == pytest.approx(at_once, abs=1e-4)


def test_answers_continue_their_prompts_as_transformers_does(
    client: openai.OpenAI, reference: Any, tokenizer: Any
) -> None:
    prompts = ["How do I", "Why is the sky blue? Because", "A or"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=9)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        mask = torch.ones_like(ids)
        written = reference.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert choice.text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.system_fingerprint


def test_stream_gives_the_whole_answer_with_its_scores(client: openai.OpenAI, http: httpx.Client) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "How do I", "max_tokens": 12, "echo": True, "logprobs": 2}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    expected = whole.choices[0].logprobs
    assert expected is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [entry for choice in choices if choice.logprobs for entry in getattr(choice.logprobs, name)]
        assert streamed == getattr(expected, name)
    assert [choice.finish_reason for choice in choices][-2:] == [None, "length"]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    with http.stream("POST", "/v1/completions", json=options | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(Completion.model_validate_json(line.removeprefix("data: ")) for line in lines[:-1])


def test_scoring_can_be_streamed_too(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "How do I", "max_tokens": 0, "echo": True, "logprobs": 0}
    (chunk,) = client.completions.create(**options, stream=True)
    assert chunk.choices == client.completions.create(**options).choices


def test_stop_cuts_a_completion(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="How do I", max_tokens=16).choices[0].text
    cut = client.completions.create(model="tiny", prompt="How do I", max_tokens=16, stop=[free[5]]).choices[0]
    assert (cut.text, cut.finish_reason) == (free[: free.index(free[5])], "stop")


def test_rendered_prompt_keeps_its_special_tokens_in_place(http: httpx.Client) -> None:
    prompt = "<s><|user|>How do I bake bread?<|assistant|>"
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "echo": True, "logprobs": 0}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:2] == ["<s>", "<|user|>"]
    assert logprobs["text_offset"][:3] == [0, 3, 11]
    assert logprobs["text_offset"][logprobs["tokens"].index("<|assistant|>")] == len(prompt) - len("<|assistant|>")
    assert choice["text"].startswith(prompt)
    chat = http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, "max_tokens": 4}).json()
    assert choice["text"].removeprefix(prompt) == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "none of them empty"),
        ({"prompt": []}, "none of them empty"),
        ({"prompt": ["a"] * 65}, "1 to 64 prompts"),
        ({"prompt": [5, 100_000]}, "prompt holds the token id 100000; the model's ids are 0 to 3"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": [1.5]}, "prompt"),
        ({"max_tokens": 0}, "set echo to score the prompt"),
        ({"logprobs": 6}, "logprobs: Input should be less than or equal to 5"),
        ({"n": 2}, "n is 2, but one answer per prompt"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"suffix": "."}, "suffix is not supported"),
        ({"prompt": ["a", "b"], "stream": True}, "stream takes one prompt"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "at most 4 strings"),
        (
            {"max_tokens": 127},
            "the prompt has 6 tokens and the answer may have 127, together 133; the model's context is 128 tokens",
        ),
    ],
)
def test_completion_that_cannot_be_served_is_refused_by_name(
    http: httpx.Client, change: dict[str, Any], message: str
) -> None:
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "How do I"} | change)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_prompts_beyond_the_queue_are_refused_and_leave_nothing_behind(model: Path) -> None:
    with serving_inference(model, max_batch=1, max_waiting=3) as url, httpx.Client(base_url=url, timeout=20) as http:
        body: dict[str, Any] = {"model": "tiny", "prompt": ["How do I"] * 12, "max_tokens": 60}
        refused = http.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        answer = http.post("/v1/completions", json=body | {"prompt": ["How do I"] * 3}).raise_for_status().json()
    assert len({choice["text"] for choice in answer["choices"]}) == 1


# Log-probabilities of chats


def test_chat_reports_the_logprobs_of_what_it_wrote(client: openai.OpenAI, reference: Any, tokenizer: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=16, logprobs=True, top_logprobs=4)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    content = logprobs.content or []
    assert len(content) == 16
    rendered = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    for entry in content:
        likeliest = plain_logprobs(reference, ids)[-1].topk(4)
        assert entry.logprob == pytest.approx(likeliest.values[0].item(), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
        assert entry.top_logprobs[0].token == entry.token
        ids.append(int(likeliest.indices[0]))
    whole = bytes(byte for entry in content for byte in entry.bytes or [])
    assert whole.decode(errors="replace") == tokenizer.decode(ids[-16:], skip_special_tokens=True)


def test_streamed_chat_reports_the_same_logprobs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 16, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options).choices[0]
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.message.content
    assert whole.logprobs is not None
    streamed = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    assert streamed == whole.logprobs.content


def test_logprobs_are_left_out_unless_asked_for(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 2}
    assert "logprobs" not in http.post("/v1/chat/completions", json=body).json()["choices"][0]
    alone = http.post("/v1/chat/completions", json=body | {"logprobs": True}).json()["choices"][0]["logprobs"]
    assert [entry["top_logprobs"] for entry in alone["content"]] == [[], []]


# Fields


def test_text_parts_are_joined_by_line_ends(http: httpx.Client) -> None:
    def text(content: Any) -> str:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12}
        return str(http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])

    parts = [{"type": "text", "text": "How do I"}, {"type": "text", "text": "bake bread?"}]
    assert text(parts) == text("How do I\nbake bread?") != text("How do I bake bread?")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"top_k": 5}, "top_k"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"messages": [ASK[0] | {"name": "Ada"}]}, "messages.0.name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}, *ASK]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_field_that_would_be_ignored_is_refused_by_name(
    http: httpx.Client, change: dict[str, Any], param: str, stream: bool
) -> None:
    response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, "stream": stream} | change)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert param in response.json()["error"]["message"]


def test_field_that_asks_for_nothing_changes_nothing(http: httpx.Client) -> None:
    neutral = {
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "response_format": {"type": "text"},
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "top_logprobs": None, "logprobs": None,
        "temperature": None, "top_p": None, "seed": None, "stop": None, "n": None, "max_tokens": 6, "user": "ada",
        "metadata": {"a": "b"}, "store": True, "top_k": -1, "repetition_penalty": 1.0, "skip_special_tokens": True,
        "stream": None, "modalities": ["text"], "service_tier": "auto", "function_call": "none",
    }  # fmt: skip
    history: list[Any] = [
        {"role": "assistant", "content": "Hello.", "refusal": None, "tool_calls": None, "annotations": []}
    ]
    plain = {"model": "tiny", "messages": [{"role": "assistant", "content": "Hello."}, *ASK], "max_tokens": 6}
    answers = [
        http.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"]
        for body in (plain, plain | neutral | {"messages": history + ASK})
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "change",
    [{"top_k": 5}, {"repetition_penalty": 1.2}, {"watermark": True}, {"grammar": {"type": "json"}}, {"best_of": 3}],
)
def test_tgi_parameter_that_would_be_ignored_is_refused_by_name(http: httpx.Client, change: dict[str, Any]) -> None:
    response = http.post("/generate", json={"inputs": "How do I", "parameters": change})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert f"parameters.{next(iter(change))} is not supported" in response.json()["error"]


def test_model_is_described_by_its_name(client: openai.OpenAI, http: httpx.Client) -> None:
    assert client.models.retrieve("fedward").id == "fedward"
    assert http.get("/v1/models/tiny").json() == http.get("/v1/models").json()["data"][1]
    with pytest.raises(openai.NotFoundError, match="model 'org/other' is not loaded; known: fedward, tiny"):
        client.models.retrieve("org/other")


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_usage_counts_every_token_once(http: httpx.Client, max_tokens: int) -> None:
    """Also that of a one-token answer, which ends as soon as its prompt has been read."""
    body = {"model": "tiny", "messages": ASK, "max_tokens": max_tokens}
    for _ in range(5):
        usage = http.post("/v1/chat/completions", json=body).json()["usage"]
        assert usage == {"prompt_tokens": 15, "completion_tokens": max_tokens, "total_tokens": 15 + max_tokens}
    lines = http.post("/v1/chat/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}})
    last = json.loads(lines.text.split("\n\n")[-3].removeprefix("data: "))
    assert last["usage"]["completion_tokens"] == max_tokens


ODD: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = (
    "model", "prompt", "messages", "stream", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "echo",
    "logprobs", "top_logprobs", "tools", "response_format", "stream_options", "inputs", "parameters",
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/generate", "/v1/release/canary"]),
    change=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), ODD, max_size=3),
)
def test_odd_request_is_never_a_server_error(http: httpx.Client, route: str, change: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": "How", "messages": ASK, "inputs": "How", "max_tokens": 2} | change
    if route != "/v1/chat/completions":
        body = {name: value for name, value in body.items() if name != "messages" or name in change}
    response = http.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code < 500, response.text


@pytest.mark.parametrize("name", ["\ud800", "x" * 5000, "\n"])
def test_odd_field_name_is_no_server_error(http: httpx.Client, name: str) -> None:
    body = json.dumps({"model": "tiny", "messages": ASK, name: 1})
    response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert len(response.json()["error"]["message"]) < 300
