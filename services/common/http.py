"""Calls from one process to another: a sync client with bounded retries, and one place that reads failures.

Only failures that a retry can mend are retried: no connection, a timeout, 429 and 5xx. A 4xx is the caller's own
mistake and is raised at once.
"""

from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from services.contracts.constitution import describe
from services.contracts.errors import ErrorBody, UpstreamRejected, UpstreamUnavailable

Answer = TypeVar("Answer", bound=BaseModel)


def unavailable(upstream: str, error: httpx.RequestError) -> UpstreamUnavailable:
    """The error for a call that got no proper answer, in our words: httpx quotes what it sent and received."""
    reason = "the connection broke"
    if isinstance(error, httpx.TimeoutException):
        reason = "no answer within the deadline"
    elif isinstance(error, httpx.ConnectError):
        reason = "cannot be reached"
    return UpstreamUnavailable(upstream, reason)


def read_answer(upstream: str, response: httpx.Response, answer: type[Answer], *, quote: bool = True) -> Answer:
    """Parse a service's JSON answer.

    Args:
        upstream: the service's name in error messages.
        response: what it answered.
        answer: the shape that is expected.
        quote: put the message of its error body into ours. Fedward's services never quote a prompt; others may.

    Raises:
        UpstreamUnavailable: 429, 5xx, or a 2xx whose body does not fit ``answer``.
        UpstreamRejected: any other status.
    """
    if not response.is_success:
        passing = response.status_code == 429 or response.status_code >= 500
        reason = error_message(response) if quote else response.reason_phrase
        raise (UpstreamUnavailable if passing else UpstreamRejected)(upstream, f"HTTP {response.status_code}: {reason}")
    try:
        return answer.model_validate_json(response.content)
    except ValidationError as error:
        raise UpstreamUnavailable(upstream, f"answered something unreadable: {describe(error)}") from error


def error_message(response: httpx.Response) -> str:
    """The message of an error body; of any other body nothing, since it may quote a prompt."""
    try:
        return ErrorBody.model_validate_json(response.content).error.message
    except ValidationError:
        return response.reason_phrase


class ServiceClient:
    """A kept connection to one service, for the trainer and for scripts.

    Args:
        upstream: the service's name in error messages, for example ``safety``.
        base_url: where it listens.
        timeout_seconds: deadline of one attempt.
        attempts: how often a call is tried in all; waits of about 0.5, 1, 2 ... seconds lie between.
    """

    def __init__(self, upstream: str, base_url: str, *, timeout_seconds: float = 60.0, attempts: int = 4) -> None:
        self.upstream = upstream
        self._client = httpx.Client(base_url=base_url, timeout=timeout_seconds)
        self._retrying = Retrying(
            retry=retry_if_exception_type(UpstreamUnavailable),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential_jitter(multiplier=0.5, max=8.0, jitter=0.25),
            reraise=True,
        )

    def get(self, path: str, answer: type[Answer]) -> Answer:
        """GET ``path``; raises UpstreamUnavailable or UpstreamRejected."""
        return self._call("GET", path, None, answer)

    def post(self, path: str, body: BaseModel, answer: type[Answer]) -> Answer:
        """POST ``body`` as JSON; raises UpstreamUnavailable or UpstreamRejected."""
        return self._call("POST", path, body, answer)

    def _call(self, method: str, path: str, body: BaseModel | None, answer: type[Answer]) -> Answer:
        content = None if body is None else body.model_dump_json(exclude_none=True)
        headers = {"content-type": "application/json"}

        def attempt() -> Answer:
            try:
                response = self._client.request(method, path, content=content, headers=headers)
            except httpx.RequestError as error:
                raise unavailable(self.upstream, error) from error
            return read_answer(self.upstream, response, answer)

        return self._retrying(attempt)

    def close(self) -> None:
        """Close the kept connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
