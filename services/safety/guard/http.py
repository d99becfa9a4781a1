"""A guard model behind TGI, vLLM or another OpenAI-compatible server."""

import asyncio
import math
from dataclasses import replace
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, SecretStr
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from services.common.http import read_answer, unavailable
from services.contracts.errors import UpstreamError, UpstreamUnavailable
from services.safety.guard.base import DEFAULT_THRESHOLDS, Guard, Thresholds
from services.safety.guard.families import Ask, Family
from services.safety.guard.parsing import Answer, Position
from services.safety.guard.prompts import Turn

UPSTREAM = "guard model"
_ATTEMPTS = 3
_CONNECT_SECONDS = 5.0
_READY_SECONDS = 2.0
_BODY_LIMIT = 1_000_000
_TOP_LOGPROBS = 5  # TGI gives no more
# Conversations whose prompts differ in length, unless the server's chat template is at fault.
_SHORT, _LONG = [Turn("user", "a")], [Turn("user", "a b c d e f g h i j k l m n o p")]
_EXCHANGE = [*_SHORT, Turn("assistant", "b c d e f g h i j k l m n o p q")]


class GuardServer(BaseModel):
    """Where a guard model is served, and how hard it may be worked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: HttpUrl
    model: str = Field(min_length=1)
    api_key: SecretStr | None = None
    timeout_seconds: float = Field(default=10.0, gt=0)
    concurrency: int = Field(default=8, ge=1)


class _Token(BaseModel):
    token: str
    logprob: float = Field(allow_inf_nan=False)


class _Position(_Token):
    top_logprobs: list[_Token] | None = None


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0


class _Completion(BaseModel):
    """What is read of a chat completion."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class HttpGuard(Guard):
    """Asks a model server; what a retry can mend is tried three times within one deadline.

    Args:
        family: how the model is asked and read.
        server: where it is; at most ``concurrency`` requests are under way, and each has ``timeout_seconds`` from
            when its turn comes, retries included.
        thresholds: the least P(unsafe) at which an item is unsafe.
    """

    def __init__(self, family: Family, server: GuardServer, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> None:
        super().__init__(family, server.model, thresholds)
        headers = {"accept-encoding": "identity"}  # a small compressed body must not become a huge one in memory
        if server.api_key:
            headers["authorization"] = f"Bearer {server.api_key.get_secret_value()}"
        self._client = httpx.AsyncClient(
            base_url=str(server.url).rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),  # the places bound them
            trust_env=False,  # conversations go to the configured server and to no proxy
        )
        self._timeout = server.timeout_seconds
        self._places = asyncio.Semaphore(server.concurrency)
        self._checked = False

    async def ready(self) -> str | None:
        """None when the server answers and puts whole conversations to the model, else the reason."""
        try:
            response = await self._client.get("/v1/models", timeout=_READY_SECONDS)
            if response.status_code in (401, 403) or response.status_code >= 500:
                return f"{UPSTREAM}: HTTP {response.status_code}"
            fault = None if self._checked else await self._template_fault()
        except httpx.RequestError as error:
            return unavailable(UPSTREAM, error).message
        except UpstreamError as error:
            return error.message
        self._checked = fault is None
        return f"{UPSTREAM}: {fault}" if fault else None

    async def aclose(self) -> None:
        """Close the kept connections."""
        await self._client.aclose()

    async def _template_fault(self) -> str | None:
        """What the server's chat template does wrong, by the token counts of three prompts; None without counts.

        Some guards' templates read a message's content as a list: from a server that hands them a string they make an
        empty conversation, which every guard calls safe. And some servers take an assistant's last message for the
        beginning of the answer, and leave out all that the template puts after it: the question.
        """
        short, long, exchange = [await self._prompt_tokens(turns) for turns in (_SHORT, _LONG, _EXCHANGE)]
        if short and short == long:
            return "its chat template drops the text of messages; give the server one that reads content as a string"
        if exchange and exchange <= short:
            return "it continues a last assistant message in place of judging it (llama.cpp: --no-prefill-assistant)"
        return None

    async def _prompt_tokens(self, turns: list[Turn]) -> int:
        ask = replace(self._family.asks(turns)[0], max_tokens=1)
        usage = (await self._complete(ask)).usage
        return usage.prompt_tokens if usage else 0

    async def _answer(self, ask: Ask) -> Answer:
        choice = (await self._complete(ask)).choices[0]
        positions = (choice.logprobs.content or []) if choice.logprobs else []
        return Answer(
            text=choice.message.content or "",
            cut_off=choice.finish_reason == "length",
            positions=[
                Position(one.token, {top.token: math.exp(min(top.logprob, 0.0)) for top in one.top_logprobs or []})
                for one in positions
            ],
        )

    async def _complete(self, ask: Ask) -> _Completion:
        """The server's completion; raises UpstreamUnavailable or UpstreamRejected."""
        body = self._body(ask)
        async with self._places:
            try:
                async with asyncio.timeout(self._timeout):
                    async for attempt in AsyncRetrying(
                        retry=retry_if_exception_type(UpstreamUnavailable),
                        stop=stop_after_attempt(_ATTEMPTS),
                        wait=wait_random_exponential(multiplier=0.1, max=2.0),
                        reraise=True,
                    ):
                        with attempt:
                            completion = await self._post(body)
            except TimeoutError as error:
                raise UpstreamUnavailable(UPSTREAM, "no answer within the deadline") from error
        return completion

    def _body(self, ask: Ask) -> dict[str, Any]:
        options = dict(ask.template_options)
        return {
            "model": self.model_id,
            "messages": [{"role": turn.role, "content": turn.text} for turn in ask.messages],
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": False,
            "logprobs": True,
            "top_logprobs": _TOP_LOGPROBS,
            # vLLM takes the template's variables in one object, TGI a guideline as a field of its own.
            **({"chat_template_kwargs": options, **options} if options else {}),
            **({} if ask.generation_prompt else {"add_generation_prompt": False}),
        }

    async def _post(self, body: dict[str, Any]) -> _Completion:
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                content = await _read(response)
        except httpx.RequestError as error:
            raise unavailable(UPSTREAM, error) from error
        return read_answer(UPSTREAM, httpx.Response(response.status_code, content=content), _Completion, quote=False)


async def _read(response: httpx.Response) -> bytes:
    """The body, up to a limit: a guard's answer is short."""
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > _BODY_LIMIT:
            raise UpstreamUnavailable(UPSTREAM, f"answered more than {_BODY_LIMIT} bytes")
    return bytes(content)
