"""A language model behind any OpenAI-compatible server: TGI, vLLM, llama.cpp, Fedward's own inference service."""

import asyncio
import re
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from services.common.http import read_answer, unavailable
from services.contracts.errors import PromptTooLong, UpstreamUnavailable
from services.critique.backend import Letter, Text
from services.critique.settings import CritiqueSettings

UPSTREAM = "critique model"
_TOO_LONG = PromptTooLong.code  # OpenAI's own code for it
Result = TypeVar("Result")
_LETTERS: dict[str, Letter] = {"A": "A", "B": "B"}


class _Token(BaseModel):
    token: str
    logprob: float


class _Position(BaseModel):
    top_logprobs: list[_Token] = []


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Completion(BaseModel):
    """What is read of a chat completion."""

    choices: list[_Choice]


class OpenAIModel:
    """Asks one prompt per request, several at the same time, and retries what a retry can mend."""

    def __init__(self, settings: CritiqueSettings) -> None:
        assert settings.model  # the settings refuse an openai backend without a model and a URL
        assert settings.upstream_url
        self.model_id = settings.model
        key = settings.upstream_api_key
        self._client = httpx.AsyncClient(
            base_url=settings.upstream_url.rstrip("/").removesuffix("/v1"),
            headers={"authorization": f"Bearer {key.get_secret_value()}"} if key else {},
            timeout=settings.upstream_timeout_seconds,
        )
        self._places = asyncio.Semaphore(settings.upstream_concurrency)

    async def ready(self) -> str | None:
        """Whether the server answers at all; which models it has is its own business."""
        try:
            response = await self._client.get("/v1/models", timeout=2.0)
        except httpx.RequestError as error:
            return unavailable(UPSTREAM, error).message
        return f"{UPSTREAM}: HTTP {response.status_code}" if response.status_code >= 500 else None

    async def close(self) -> None:
        """Close the kept connections."""
        await self._client.aclose()

    async def generate(self, prompts: Sequence[str], max_tokens: int) -> list[Text]:
        """Answer each prompt at temperature 0.

        Raises:
            UpstreamUnavailable, UpstreamRejected: the server failed, or refused a prompt.
        """

        async def answer(prompt: str) -> Text:
            choice = await self._ask(prompt, {"max_tokens": max_tokens})
            if choice is None:
                return Text("", "too_long")
            return Text(choice.message.content or "", "end" if choice.finish_reason == "stop" else "cut_off")

        return await _all(answer(prompt) for prompt in prompts)

    async def choose(self, prompts: Sequence[str]) -> list[Letter | None]:
        """A or B by the first token's log-probabilities where the server gives them, else by the text.

        Raises:
            UpstreamUnavailable, UpstreamRejected: the server failed, or refused a prompt.
        """

        async def letter(prompt: str) -> Letter | None:
            choice = await self._ask(prompt, {"max_tokens": 4, "logprobs": True, "top_logprobs": 5})
            return _letter(choice) if choice else None

        return await _all(letter(prompt) for prompt in prompts)

    async def _ask(self, prompt: str, options: dict[str, Any]) -> _Choice | None:
        """The server's answer; None when it says that the prompt does not fit its model's context."""
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.model_id, "messages": messages, "temperature": 0, "seed": 0, **options}
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(UpstreamUnavailable),
            stop=stop_after_attempt(3),
            wait=wait_random_exponential(multiplier=0.25, max=4.0),
            reraise=True,
        ):
            with attempt:
                async with self._places:
                    completion = await self._post(body)
        if completion is None:
            return None
        if not completion.choices:
            raise UpstreamUnavailable(UPSTREAM, "answered without a choice")
        return completion.choices[0]

    async def _post(self, body: dict[str, Any]) -> _Completion | None:
        try:
            response = await self._client.post("/v1/chat/completions", json=body)
        except httpx.RequestError as error:
            raise unavailable(UPSTREAM, error) from error
        if response.status_code == 400 and _TOO_LONG in response.text:
            return None
        return read_answer(UPSTREAM, response, _Completion, quote=False)


async def _all(calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run calls at the same time; when one fails, the others are cancelled and its error is raised."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _letter(choice: _Choice) -> Letter | None:
    scores: dict[Letter, float] = {}
    for token in _first_tokens(choice):
        letter = _LETTERS.get(token.token.strip())
        if letter:
            scores[letter] = max(token.logprob, scores.get(letter, token.logprob))
    if scores:
        return max(scores, key=lambda letter: scores[letter])
    match = re.search(r"\b[AB]\b", choice.message.content or "")
    return _LETTERS[match[0]] if match else None


def _first_tokens(choice: _Choice) -> list[_Token]:
    """The likeliest first tokens of an answer; none when the server gives no log-probabilities."""
    positions = choice.logprobs.content if choice.logprobs else None
    return positions[0].top_logprobs if positions else []
