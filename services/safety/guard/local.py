"""A guard model in this process: a folder or Hub name loaded with transformers. The only module that needs torch."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from services.common.model_files import context_tokens, end_ids, locate_model
from services.contracts.errors import ConfigError
from services.safety.guard.base import DEFAULT_THRESHOLDS, Guard, Thresholds, Unasked
from services.safety.guard.families import Ask, Family
from services.safety.guard.parsing import Answer, Position

_TOP = 20


class LocalGuard(Guard):
    """Answers by greedy decoding, with the probabilities of the likeliest tokens from the logits.

    Code that comes with a model is never run. One conversation is answered at a time, in a thread of its own.

    Args:
        family: how the model is asked and read.
        model: a folder, or a Hub name such as ``org/name``.
        thresholds: the least P(unsafe) at which an item is unsafe.
        device: ``auto`` takes a GPU if there is one.
        threads: CPU threads for one model step.

    Raises:
        ConfigError: the model or device cannot be had.
    """

    def __init__(
        self,
        family: Family,
        model: str,
        thresholds: Thresholds = DEFAULT_THRESHOLDS,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int = 1,
    ) -> None:
        source = locate_model(model)
        super().__init__(family, source.model_id, thresholds)
        torch.set_num_threads(threads)
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers gives it no types
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("the guard's device is cuda, but torch sees no GPU; use cpu", param="device")
        self._device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        self._tokenizer, self._network = _load(source.location, "float32" if self._device.type == "cpu" else "auto")
        nn.Module.to(self._network, self._device)
        self._network.eval()
        self._context = context_tokens(self._network.config)
        self._pad = self._tokenizer.pad_token_id or 0
        self._ends = end_ids(self._network.generation_config, self._tokenizer)
        self._markers = _special_tokens(self._tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guard-model")

    async def ready(self) -> str | None:
        """The model is loaded when the process serves."""
        return None

    async def aclose(self) -> None:
        """End the model's thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _plain(self, text: str) -> str:
        return self._markers.sub(lambda found: f"{found[0][0]} {found[0][1:]}", super()._plain(text))

    async def _answer(self, ask: Ask) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, ask)

    @torch.inference_mode()
    def _generate(self, ask: Ask) -> Answer:
        ids = self._tokenizer(self._rendered(ask), add_special_tokens=False)["input_ids"]
        if len(ids) + ask.max_tokens > self._context:
            raise Unasked("the conversation does not fit the guard model's context")
        ids_1t = torch.tensor([ids], device=self._device)
        config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers gives it no types
            do_sample=False,
            max_new_tokens=ask.max_tokens,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._ends),
            return_dict_in_generate=True,
            output_logits=True,
        )
        output = self._network.generate(
            input_ids=ids_1t, attention_mask=torch.ones_like(ids_1t), generation_config=config
        )
        written = output.sequences[0, len(ids) :].tolist()
        end = next((place for place, token_id in enumerate(written) if token_id in self._ends), None)
        # Special tokens other than the end stay visible, and make the answer unreadable.
        return Answer(
            text=self._decoded(written[:end]),
            cut_off=end is None,
            positions=[
                Position(self._decoded([token_id]), self._likeliest(logits_1v[0]))
                for token_id, logits_1v in zip(written[:end], output.logits, strict=False)
            ],
        )

    def _likeliest(self, logits_v: Tensor) -> dict[str, float]:
        """The likeliest tokens' texts and probabilities; tokens of the same text count together."""
        top = logits_v.float().softmax(dim=0).topk(min(_TOP, logits_v.shape[0]))
        found: dict[str, float] = {}
        for token_id, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            text = self._decoded([token_id])
            found[text] = found.get(text, 0.0) + probability
        return found

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _rendered(self, ask: Ask) -> str:
        """What the model reads; raises Unasked unless every message is in it.

        Some guards' templates take a message's content as a list of parts and make nothing at all of a string: the
        model would call an empty conversation safe.
        """
        texts = [turn.text for turn in ask.messages]
        if not self._tokenizer.chat_template:
            if len(texts) > 1:
                raise Unasked("the guard model has no chat template")
            return texts[0]  # a prompt of the operator's own, markers and all
        for contents in (texts, [[{"type": "text", "text": text}] for text in texts]):
            messages = [{"role": t.role, "content": c} for t, c in zip(ask.messages, contents, strict=True)]
            try:
                rendered = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=ask.generation_prompt, **ask.template_options
                )
            except (TemplateError, TypeError):  # a template that takes one form may fail on the other
                continue
            if all(text.strip() in rendered for text in texts):
                return str(rendered)
        raise Unasked("the guard model's chat template refuses the conversation, or drops a part of it")


def _load(location: str, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and network; Any, because transformers' generate() is typed for another self."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        network = AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cannot load guard model {location}: {reason}; give a folder, or fetch it: hf download {location}",
            param="model",
        ) from error
    return tokenizer, network


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern of the model's control tokens, longest first; it matches nothing where there are none."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
