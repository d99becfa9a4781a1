"""Every error that Fedward raises on purpose, and the one JSON body they all become over HTTP.

::

    FedwardError
    ├── ConfigError              a setting, flag or file is missing, unknown or contradictory
    ├── DataError                a data file is missing or malformed (names file:line)
    ├── AdapterError             an adapter is not what its manifest or receiver expects
    │   └── AdapterHashMismatch  the bytes do not have the promised sha256
    ├── RequestError             the caller's request is at fault (HTTP 4xx)
    │   ├── UnknownModel         no model or adapter of that name
    │   ├── PromptTooLong        prompt plus answer do not fit the context
    │   ├── BodyTooLarge         the request body is over the limit
    │   ├── HeadTooLarge         the request's headers are over the limit
    │   ├── Unauthorized         no valid API key or token (says in ``WWW-Authenticate`` what is wanted)
    │   └── QuotaExceeded        the tenant's requests or tokens are used up (says when to try again)
    ├── Overloaded               a bounded queue is full; try again later
    ├── UpstreamError            a service that this process depends on failed (names the service)
    │   ├── UpstreamUnavailable  unreachable, timed out, or answered 5xx
    │   └── UpstreamRejected     it answered 4xx: the request we sent was wrong
    └── GateRefused              the release gate does not let an adapter through

A process that ends with one of these prints ``error: <message>`` and exits with the class's ``exit_code``,
so that a Kubernetes Job's exit code means something.
"""

from typing import Any, ClassVar

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong: OpenAI's error object, so that OpenAI clients raise their own typed errors."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    """The JSON body of every error answer (TGI routes excepted: they follow TGI's own schema)."""

    error: ErrorDetail


class FedwardError(Exception):
    """Base of all deliberate errors; ``code`` is stable and machine-readable."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers: dict[str, str] = {}  # that go with the HTTP answer

    def body(self) -> dict[str, Any]:
        """The JSON error body for this error."""
        kind = "invalid_request_error" if self.http_status < 500 else "server_error"
        return ErrorBody(
            error=ErrorDetail(message=self.message, type=kind, code=self.code, param=self.param)
        ).model_dump()


class ConfigError(FedwardError):
    """A setting is missing, unknown or contradicts another; the message names it."""

    code = "bad_configuration"
    exit_code = 2


class DataError(FedwardError):
    """A data file is missing or malformed; the message starts with ``file:line``."""

    code = "bad_data"
    exit_code = 3


class AdapterError(FedwardError):
    """An adapter's names, shapes, dtypes or values are not what they must be."""

    code = "bad_adapter"
    http_status = 400
    exit_code = 4


class AdapterHashMismatch(AdapterError):
    """An adapter's bytes do not have the sha256 that was promised."""

    code = "adapter_hash_mismatch"
    http_status = 409


class RequestError(FedwardError):
    """The caller's request is malformed or cannot be served as asked."""

    code = "invalid_request"
    http_status = 400


class UnknownModel(RequestError):
    """No model or adapter of that name is loaded."""

    code = "model_not_found"
    http_status = 404


class PromptTooLong(RequestError):
    """Prompt and requested answer together exceed the model's context."""

    code = "context_length_exceeded"


class BodyTooLarge(RequestError):
    """The request body is larger than the configured limit."""

    code = "body_too_large"
    http_status = 413


class HeadTooLarge(RequestError):
    """The request's headers are too many or too large."""

    code = "headers_too_large"
    http_status = 431


class Unauthorized(RequestError):
    """The request carries no API key or token that is valid here; the message never quotes what it carried.

    Args:
        message: what is wrong, in our words.
        error: RFC 6750 section 3.1's code, ``invalid_token``; None when the request carried no credentials at all.
    """

    code = "invalid_api_key"
    http_status = 401

    def __init__(self, message: str, *, error: str | None = None) -> None:
        super().__init__(message)
        challenge = 'Bearer realm="fedward"'
        if error:
            described = message.replace("\\", "").replace('"', "'").encode("ascii", "replace").decode()
            challenge += f', error="{error}", error_description="{described}"'
        self.headers = {"www-authenticate": challenge}


class QuotaExceeded(RequestError):
    """The tenant has used up its requests or tokens for now.

    Args:
        message: which limit was met.
        retry_after_seconds: when it is worth trying again, in whole seconds.
        headers: the ``x-ratelimit-*`` headers of the answer.
    """

    code = "rate_limit_exceeded"
    http_status = 429

    def __init__(self, message: str, *, retry_after_seconds: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = {**(headers or {}), "retry-after": str(retry_after_seconds)}


class Overloaded(FedwardError):
    """A bounded queue is full; the answer carries ``Retry-After``."""

    code = "overloaded"
    http_status = 429


class UpstreamError(FedwardError):
    """A service this process depends on failed; ``upstream`` names it."""

    code = "upstream_error"
    http_status = 502
    exit_code = 5

    def __init__(self, upstream: str, message: str) -> None:
        super().__init__(f"{upstream}: {message}")
        self.upstream = upstream


class UpstreamUnavailable(UpstreamError):
    """The service is unreachable, too slow, or answered 5xx or nonsense."""

    code = "upstream_unavailable"
    http_status = 503


class UpstreamRejected(UpstreamError):
    """The service answered 4xx: the request that we made was wrong, so a retry would not help."""

    code = "upstream_rejected"


class GateRefused(FedwardError):
    """The release gate found the adapter worse than the configured bound."""

    code = "gate_refused"
    http_status = 409
    exit_code = 6
