"""What a request becomes: a generation with its prompt encoded, its limits checked and its variant chosen."""

import asyncio
import random
from pathlib import Path

from pydantic import ValidationError

from services.contracts.adapters import LoadAdapterRequest, read_manifest
from services.contracts.chat import ChatRequest, GenerateRequest
from services.contracts.constitution import describe
from services.contracts.errors import AdapterError, PromptTooLong, RequestError
from services.inference.adapters import Adapters
from services.inference.answers import Pieces
from services.inference.batch import Batch
from services.inference.engine import Engine
from services.inference.generation import Generation, Variant
from services.inference.model import BaseModel
from services.inference.sampling import Sampler
from services.inference.settings import InferenceSettings
from services.inference.text import Detokenizer, StopScanner

MAX_STOPS = 4
# What Hugging Face's clients send as the model when they were given only a URL; TGI ignores the field.
PLACEHOLDERS = frozenset({"dummy", "tgi"})


class InferenceService:
    """One base model with its adapters and its engine; the routes call it and know nothing of torch."""

    def __init__(self, base: BaseModel, settings: InferenceSettings) -> None:
        self.base = base
        self.settings = settings
        self.engine = Engine(max_batch=settings.max_batch, max_waiting=settings.max_waiting)
        self.adapters = Adapters(
            Variant(base.model_id, base.sha256, base.network),
            served_name=settings.served_model_name,
            directory=settings.adapters_dir,
            limit=settings.max_adapters,
        )

    async def chat(self, request: ChatRequest) -> Pieces:
        """Submit an OpenAI chat completion.

        Raises:
            RequestError, UnknownModel, PromptTooLong, Overloaded: it cannot be served as asked, or not now.
        """
        if request.n > 1:
            raise RequestError(
                f"n is {request.n}, but one answer per request is generated; send {request.n} requests", param="n"
            )
        served = self.settings.served_model_name
        variant = self.adapters.find(served if request.model in PLACEHOLDERS else request.model)
        self._refuse_hopeless([message.content or "" for message in request.messages])
        prompt_ids = await asyncio.to_thread(self.base.encoder.encode_chat, request.messages)
        sampler = None
        if request.temperature > 0:
            sampler = Sampler(temperature=request.temperature, top_p=request.top_p, seed=request.seed)
        limit = request.max_completion_tokens or request.max_tokens
        stops = StopScanner(_check_stops(request.stop_strings()))
        generation = self._generation(variant, prompt_ids, limit, sampler, stops)
        return Pieces(self.engine, generation, streaming=request.stream)

    async def generate(self, request: GenerateRequest, *, streaming: bool) -> Pieces:
        """Submit a TGI generation. ``inputs`` is continued as it stands: no chat template is applied.

        As in TGI, a temperature or top-p other than 1 asks for sampling, and without a seed one is drawn.

        Raises:
            RequestError, UnknownModel, PromptTooLong, Overloaded: it cannot be served as asked, or not now.
        """
        if not request.inputs:
            raise RequestError("`inputs` cannot be empty", param="inputs")
        wanted = request.parameters
        variant = self.adapters.find(wanted.adapter_id or self.settings.served_model_name)
        self._refuse_hopeless([request.inputs])
        prompt_ids = await asyncio.to_thread(self.base.encoder.encode_text, request.inputs)
        temperature, top_p = wanted.temperature or 1.0, wanted.top_p or 1.0
        sampler = None
        if wanted.do_sample or temperature != 1.0 or top_p != 1.0:
            seed = random.getrandbits(63) if wanted.seed is None else wanted.seed
            sampler = Sampler(temperature=temperature, top_p=top_p, seed=seed)
        stops = StopScanner(_check_stops(wanted.stop), keep=True)
        generation = self._generation(variant, prompt_ids, wanted.max_new_tokens, sampler, stops)
        return Pieces(self.engine, generation, streaming=streaming)

    def warm_up(self) -> None:
        """Write two tokens, so that the first request does not pay for what is set up on first use."""
        prompt_ids = self.base.encoder.encode_text("a")
        variant = self.adapters.find(self.settings.served_model_name)
        batch = Batch(variant.network)
        batch.admit([self._generation(variant, prompt_ids, 2, None, StopScanner([]))])
        batch.step()

    def load_release(self, path: Path) -> None:
        """Load the adapter in ``path`` under its folder's name and activate it; raises AdapterError."""
        sha256 = read_manifest(path).sha256
        try:
            request = LoadAdapterRequest(lora_name=path.resolve().name, lora_path=str(path.resolve()), sha256=sha256)
        except ValidationError as error:
            raise AdapterError(f"adapter {path}: {describe(error)}; rename the folder") from error
        self.adapters.load(request)
        self.adapters.activate(request.lora_name, sha256)

    def _generation(
        self,
        variant: Variant,
        prompt_ids: list[int],
        limit: int | None,
        sampler: Sampler | None,
        stops: StopScanner,
    ) -> Generation:
        return Generation(
            variant=variant,
            prompt_ids=prompt_ids,
            max_tokens=self._answer_tokens(len(prompt_ids), limit),
            sampler=sampler,
            end_ids=self.base.end_ids,
            detokenizer=Detokenizer(self.base.decode),
            stops=stops,
        )

    def _refuse_hopeless(self, texts: list[str]) -> None:
        """Refuse a prompt that is too long in any case before the time is spent to encode it."""
        fewest, context = self.base.encoder.fewest_tokens(texts), self.base.context_tokens
        if fewest > context:
            raise PromptTooLong(
                f"the prompt has at least {fewest} tokens; the model's context is {context} tokens", param="messages"
            )

    def _answer_tokens(self, prompt_tokens: int, limit: int | None) -> int:
        """The most tokens the answer may have: what is asked for, or what the context leaves."""
        context = self.base.context_tokens
        room = context - prompt_tokens
        if room < (limit or 1):
            raise PromptTooLong(
                f"the prompt has {prompt_tokens} tokens and the answer may have {limit or 1}, together "
                f"{prompt_tokens + (limit or 1)}; the model's context is {context} tokens",
                param="messages",
            )
        return limit or min(self.settings.max_answer_tokens, room)


def _check_stops(stops: list[str]) -> list[str]:
    if len(stops) > MAX_STOPS or any(not stop for stop in stops):
        raise RequestError(f"stop takes at most {MAX_STOPS} strings, none of them empty", param="stop")
    return stops
