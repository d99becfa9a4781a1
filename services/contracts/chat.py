"""Contract of text generation: OpenAI chat completions and TGI generate, the parts that Fedward reads.

Unknown fields are kept (``extra="allow"``): OpenAI-compatible servers add their own.
Sources: OpenAI API reference (chat completions); text-generation-inference ``docs/openapi.json``.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenCount = Annotated[int, Field(ge=0, lt=2**31)]
FinishReason = Literal["stop", "length", "content_filter", "tool_calls", "function_call"]


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None


class ChatRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    max_tokens: TokenCount | None = Field(default=None, ge=1)
    max_completion_tokens: TokenCount | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = 0
    stop: str | list[str] | None = None
    n: int = Field(default=1, ge=1)

    def answer_limit(self, default: int) -> int:
        """The most tokens the answer may have: the request's own limit, or ``default``."""
        return self.max_completion_tokens or self.max_tokens or default

    def stop_strings(self) -> list[str]:
        """The stop strings as a list, however the caller gave them."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Usage(BaseModel):
    """Token counts of one request."""

    prompt_tokens: TokenCount
    completion_tokens: TokenCount
    total_tokens: TokenCount


class ChatChoice(BaseModel):
    """One answer."""

    index: int = 0
    message: ChatMessage
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Answer of ``POST /v1/chat/completions``; ``system_fingerprint`` names the adapter that answered."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class ChatDelta(BaseModel):
    """What a streamed chunk adds."""

    role: str | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """One choice of a streamed chunk."""

    index: int = 0
    delta: ChatDelta
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One server-sent event of a streamed chat completion."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str | None = None
    usage: Usage | None = None


class GenerateParameters(BaseModel):
    """TGI's generation parameters, the ones that are honoured.

    Others are kept: the gateway passes them on, and the inference service refuses by name those that ask for something.
    """

    model_config = ConfigDict(extra="allow")

    max_new_tokens: TokenCount | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, gt=0.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    do_sample: bool = False
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    return_full_text: bool | None = None
    details: bool = False
    adapter_id: str | None = None


class GenerateRequest(BaseModel):
    """Body of TGI's ``POST /generate`` and ``/generate_stream``."""

    model_config = ConfigDict(extra="allow")

    inputs: str
    parameters: GenerateParameters = Field(default_factory=GenerateParameters)
    stream: bool = False


class GenerateAnswer(BaseModel):
    """Answer of TGI's ``POST /generate``; ``details`` are there when the request asks for them."""

    model_config = ConfigDict(extra="allow")

    generated_text: str
    details: dict[str, Any] | None = None


class TgiError(BaseModel):
    """TGI's own error body."""

    error: str
    error_type: str


Json = dict[str, Any]


# OpenAI's older completions, and log-probabilities. Source: OpenAI API reference (completions, chat completions).


class CompletionRequest(BaseModel):
    """Body of ``POST /v1/completions``: raw prompts as texts or as token ids.

    ``echo`` puts the prompt in front of the answer; with ``max_tokens`` 0 the prompt is only scored.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str | list[str] | list[int] | list[list[int]]
    stream: bool = False
    max_tokens: TokenCount = 16
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = 0
    stop: str | list[str] | None = None
    n: int = Field(default=1, ge=1)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=5)


class CompletionLogprobs(BaseModel):
    """One entry for each token; the first token of a prompt has no log-probability. Offsets count characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """The answer to the prompt with this index."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """Answer of ``POST /v1/completions``, or one server-sent event of it."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
