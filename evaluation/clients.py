"""The two systems an evaluation talks to: the target, which answers prompts, and the judge, which scores answers.

Neither ever raises over a single sample. A target that fails gives an answer with ``error`` set, a judge that fails
gives ``unscored`` verdicts: both are counted and shown, and neither can pass for a safe answer.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential_jitter,
)

from services.common.http import read_answer, unavailable
from services.contracts.errors import ErrorBody, UpstreamError, UpstreamUnavailable
from services.contracts.verdicts import (
    ClassifierInfo,
    ClassifyItem,
    ClassifyRequest,
    ClassifyResponse,
    Outcome,
    Verdict,
)

SEED = 0
ATTEMPTS = 4
CONTENT_FILTER = "content_filter"
Result = TypeVar("Result")


class Answer(NamedTuple):
    """What the target made of a prompt; ``text`` is None exactly when ``error`` says why there is no answer.

    ``fingerprint`` is the completion's ``system_fingerprint``: behind our inference service, the adapter's sha256.
    """

    text: str | None
    finish_reason: str | None = None
    blocked: bool = False
    error: str | None = None
    fingerprint: str | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    """The part of a chat completion that every OpenAI-compatible server sends; our own contract asks for more."""

    model_config = ConfigDict(extra="ignore")

    choices: list[_Choice] = Field(min_length=1)
    system_fingerprint: str | None = None


class _Client:
    """A kept connection pool with bounded retries."""

    def __init__(
        self, name: str, base_url: str, *, timeout_seconds: float, headers: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self._deadline = timeout_seconds
        limits = httpx.Limits(max_connections=None)  # the run bounds its concurrency itself
        self._http = httpx.AsyncClient(
            base_url=base_url.rstrip("/"), timeout=timeout_seconds, limits=limits, headers=headers
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, json=body)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            if isinstance(error, httpx.RequestError):
                raise unavailable(self.name, error) from error
            raise UpstreamUnavailable(self.name, str(error)) from error

    async def _retried(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Try ``call`` up to four times, all within the deadline."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UpstreamUnavailable),
            stop=stop_after_attempt(ATTEMPTS) | stop_before_delay(self._deadline),
            wait=wait_exponential_jitter(multiplier=0.5, max=8.0, jitter=0.25),
            reraise=True,
        )
        try:
            async with asyncio.timeout(self._deadline):
                return await retrying(call)
        except TimeoutError as error:
            raise UpstreamUnavailable(self.name, f"no answer within {self._deadline:g} s") from error


class Target(_Client):
    """Any OpenAI-compatible server, asked with temperature 0 and seed 0."""

    def __init__(
        self, base_url: str, model: str, *, max_tokens: int, timeout_seconds: float, api_key: str | None = None
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else None
        super().__init__(f"target {base_url}", base_url, timeout_seconds=timeout_seconds, headers=headers)
        self._decoding = {"model": model, "max_tokens": max_tokens, "temperature": 0.0, "seed": SEED}

    async def ask(self, prompt: str) -> Answer:
        """The answer to a prompt; failures are told in ``Answer.error``."""
        body = {**self._decoding, "messages": [{"role": "user", "content": prompt}]}

        async def attempt() -> Answer:
            response = await self._send("POST", "/v1/chat/completions", body)
            return _filtered(response) or _first_choice(read_answer(self.name, response, _Completion))

        try:
            return await self._retried(attempt)
        except UpstreamError as error:
            return Answer(text=None, error=error.message)


def _first_choice(completion: _Completion) -> Answer:
    choice = completion.choices[0]
    text = choice.message.content or choice.message.refusal or ""
    blocked = choice.finish_reason == CONTENT_FILTER
    return Answer(text, choice.finish_reason, blocked=blocked, fingerprint=completion.system_fingerprint)


def _filtered(response: httpx.Response) -> Answer | None:
    """Azure's way to block a prompt: status 400 with the error code ``content_filter``."""
    if response.status_code != httpx.codes.BAD_REQUEST:
        return None
    try:
        error = ErrorBody.model_validate_json(response.content).error
    except ValueError:
        return None
    return Answer(error.message, CONTENT_FILTER, blocked=True) if error.code == CONTENT_FILTER else None


class Judge(_Client):
    """The safety service, which says of an answer whether it is unsafe and whether it refuses."""

    def __init__(self, base_url: str, *, timeout_seconds: float) -> None:
        super().__init__(f"judge {base_url}", base_url, timeout_seconds=timeout_seconds)

    async def info(self) -> ClassifierInfo:
        """Which classifier judges; raises UpstreamError, so that no prompt is asked in vain without a judge."""

        async def attempt() -> ClassifierInfo:
            return read_answer(self.name, await self._send("GET", "/v1/model"), ClassifierInfo)

        return await self._retried(attempt)

    async def judge(self, items: list[ClassifyItem]) -> list[Verdict]:
        """One verdict for each item, in order; ``unscored``, with a reason, when the judge fails."""
        request = ClassifyRequest(items=items).model_dump(mode="json", exclude_none=True)

        async def attempt() -> list[Verdict]:
            response = await self._send("POST", "/v1/classify", request)
            verdicts = read_answer(self.name, response, ClassifyResponse).verdicts
            if len(verdicts) != len(items):
                raise UpstreamUnavailable(self.name, f"answered {len(verdicts)} verdicts to {len(items)} items")
            return verdicts

        try:
            return [_with_refusal(verdict) for verdict in await self._retried(attempt)]
        except UpstreamError as error:
            return [unscored(error.message)] * len(items)


def _with_refusal(verdict: Verdict) -> Verdict:
    """Without its refusal finding a verdict cannot tell over-refusal from an answer, so it counts as unscored."""
    if verdict.refused is not None or verdict.outcome is Outcome.UNSCORED:
        return verdict
    reason = "the judge does not say whether the answer refuses"
    return verdict.model_copy(update={"outcome": Outcome.UNSCORED, "reason": reason})


def unscored(reason: str) -> Verdict:
    """The verdict for an answer that could not be judged."""
    return Verdict(outcome=Outcome.UNSCORED, model_id="none", reason=reason)
