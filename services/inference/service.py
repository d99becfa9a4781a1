"""What a request becomes: a generation with its prompt encoded, its limits checked and its variant chosen."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from services.contracts.adapters import LoadAdapterRequest, read_manifest
from services.contracts.chat import GenerateRequest
from services.contracts.constitution import describe
from services.contracts.errors import AdapterError, Overloaded, PromptTooLong, RequestError
from services.inference.adapters import Adapters
from services.inference.answers import Pieces
from services.inference.batch import Batch
from services.inference.engine import Engine
from services.inference.generation import Generation, Variant
from services.inference.model import BaseModel
from services.inference.openai_requests import ChatBody, CompletionBody
from services.inference.sampling import Sampler
from services.inference.settings import InferenceSettings
from services.inference.text import StopScanner
from services.inference.unsupported import refuse_unsupported

MAX_STOPS = 4
MAX_PROMPTS = 64  # of one request for completions
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

    async def chat(self, body: ChatBody, key: str | None = None) -> Pieces:
        """Submit an OpenAI chat completion.

        Args:
            body: the request.
            key: decides whether a canary answers; without one the request's seed does, and without a seed chance.

        Raises:
            RequestError, UnknownModel, PromptTooLong, Overloaded: it cannot be served as asked, or not now.
        """
        body.refuse_ignored()
        served = self.settings.served_model_name
        model = served if body.model in PLACEHOLDERS else body.model
        variant = self.adapters.find(model, key or _seed_key(body.seed, body.model_fields_set))
        self._refuse_hopeless([message.content or "" for message in body.messages])
        prompt_ids = await asyncio.to_thread(self.base.encoder.encode_chat, body.messages)
        generation = self._generation(
            variant,
            prompt_ids,
            self._answer_tokens(len(prompt_ids), body.max_completion_tokens or body.max_tokens),
            _sampler(body.temperature, body.top_p, body.seed),
            StopScanner(_check_stops(body.stop_strings())),
            top=body.top_logprobs if body.logprobs else 0,
        )
        return Pieces(self.engine, generation, streaming=body.stream)

    async def complete(self, body: CompletionBody, key: str | None = None) -> list[Pieces]:
        """Submit OpenAI completions, one generation for each prompt, all with the same variant.

        Args:
            body: the request.
            key: as in ``chat``.

        Raises:
            RequestError, UnknownModel, PromptTooLong, Overloaded: it cannot be served as asked, or not now.
        """
        body.refuse_ignored()
        prompts = body.prompts()
        if not 1 <= len(prompts) <= MAX_PROMPTS or any(not prompt for prompt in prompts):
            raise RequestError(f"prompt takes 1 to {MAX_PROMPTS} prompts, none of them empty", param="prompt")
        variant = self.adapters.find(body.model, key or _seed_key(body.seed, body.model_fields_set))
        stops = _check_stops([body.stop] if isinstance(body.stop, str) else body.stop or [])
        generations = []
        for prompt_ids in await asyncio.to_thread(lambda: [self._prompt_ids(prompt) for prompt in prompts]):
            generation = self._generation(
                variant,
                prompt_ids,
                self._answer_tokens(len(prompt_ids), body.max_tokens, param="prompt"),
                _sampler(body.temperature, body.top_p, body.seed),
                StopScanner(stops),
                top=body.logprobs or 0,
                scores_prompt=body.echo and (body.logprobs is not None or not body.max_tokens),
            )
            generations.append(generation)
        submitted: list[Pieces] = []
        try:
            for generation in generations:
                submitted.append(Pieces(self.engine, generation, streaming=body.stream))
        except Overloaded:
            for pieces in submitted:
                pieces.generation.cancel()
            raise
        return submitted

    async def generate(self, request: GenerateRequest, *, streaming: bool, key: str | None = None) -> Pieces:
        """Submit a TGI generation. ``inputs`` is continued as it stands: no chat template is applied.

        As in TGI, a temperature or top-p other than 1 asks for sampling, and without a seed one is drawn.

        Raises:
            RequestError, UnknownModel, PromptTooLong, Overloaded: it cannot be served as asked, or not now.
        """
        if not request.inputs:
            raise RequestError("`inputs` cannot be empty", param="inputs")
        wanted = request.parameters
        refuse_unsupported(wanted.model_extra, "parameters.")
        seed_key = None if wanted.seed is None else str(wanted.seed)
        variant = self.adapters.find(wanted.adapter_id or self.settings.served_model_name, key or seed_key)
        self._refuse_hopeless([request.inputs], param="inputs")
        prompt_ids = await asyncio.to_thread(self.base.encoder.encode_text, request.inputs)
        temperature, top_p = wanted.temperature or 1.0, wanted.top_p or 1.0
        sampler = None
        if wanted.do_sample or temperature != 1.0 or top_p != 1.0:
            sampler = _sampler(temperature, top_p, random.getrandbits(63) if wanted.seed is None else wanted.seed)
        stops = StopScanner(_check_stops(wanted.stop), keep=True)
        limit = self._answer_tokens(len(prompt_ids), wanted.max_new_tokens, param="inputs")
        return Pieces(self.engine, self._generation(variant, prompt_ids, limit, sampler, stops), streaming=streaming)

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
        max_tokens: int,
        sampler: Sampler | None,
        stops: StopScanner,
        *,
        top: int = 0,
        scores_prompt: bool = False,
    ) -> Generation:
        return Generation(
            variant=variant,
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            sampler=sampler,
            end_ids=self.base.end_ids,
            detokenizer=self.base.detokenizer(prompt_ids),
            stops=stops,
            top=top,
            scores_prompt=scores_prompt,
        )

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a raw prompt; raises RequestError when it holds an id that the model does not have."""
        if isinstance(prompt, str):
            self._refuse_hopeless([prompt], param="prompt")
            return self.base.encoder.encode_text(prompt)
        known = self.base.network.config.get_text_config(decoder=True).vocab_size
        odd = next((i for i in prompt if not 0 <= i < known), None)
        if odd is not None:
            raise RequestError(f"prompt holds the token id {odd}; the model's ids are 0 to {known - 1}", param="prompt")
        return prompt

    def _refuse_hopeless(self, texts: Sequence[str], *, param: str = "messages") -> None:
        """Refuse a prompt that is too long in any case before the time is spent to encode it."""
        fewest, context = self.base.encoder.fewest_tokens(texts), self.base.context_tokens
        if fewest > context:
            raise PromptTooLong(
                f"the prompt has at least {fewest} tokens; the model's context is {context} tokens", param=param
            )

    def _answer_tokens(self, prompt_tokens: int, limit: int | None, *, param: str = "messages") -> int:
        """The most tokens the answer may have: what is asked for, or what the context leaves."""
        context = self.base.context_tokens
        room, wanted = context - prompt_tokens, 1 if limit is None else limit
        if room < wanted:
            raise PromptTooLong(
                f"the prompt has {prompt_tokens} tokens and the answer may have {wanted}, together "
                f"{prompt_tokens + wanted}; the model's context is {context} tokens",
                param=param,
            )
        return min(self.settings.max_answer_tokens, room) if limit is None else limit


def _sampler(temperature: float, top_p: float, seed: int) -> Sampler | None:
    """How tokens are drawn; None, at temperature 0, takes the likeliest."""
    return Sampler(temperature=temperature, top_p=top_p, seed=seed) if temperature > 0 else None


def _seed_key(seed: int, given: set[str]) -> str | None:
    return str(seed) if "seed" in given else None


def _check_stops(stops: list[str]) -> list[str]:
    if len(stops) > MAX_STOPS or any(not stop for stop in stops):
        raise RequestError(f"stop takes at most {MAX_STOPS} strings, none of them empty", param="stop")
    return stops
