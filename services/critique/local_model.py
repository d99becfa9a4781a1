"""A language model in this process: batched greedy generation with transformers. The only module that needs torch."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from services.common.chat_prompts import PromptEncoder
from services.common.model_files import context_tokens, end_ids, locate_model
from services.contracts.chat import ChatMessage
from services.contracts.errors import ConfigError
from services.critique.backend import Letter, Text
from services.critique.settings import CritiqueSettings

Result = TypeVar("Result")


class LocalModel:
    """A folder's or the Hub's causal language model, used from one thread of its own.

    Raises:
        ConfigError: the model or device cannot be had, or its tokenizer has no token for A or B.
    """

    def __init__(self, settings: CritiqueSettings) -> None:
        torch.set_num_threads(settings.threads)
        disable_progress_bar()  # type: ignore[no-untyped-call]
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch sees no GPU; use --device cpu", param="device")
        self._device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
        dtype = "float32" if self._device.type == "cpu" else "auto"
        source = locate_model(settings.model)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source.location)
            # Any: transformers' generate() is typed for another self.
            self._network: Any = AutoModelForCausalLM.from_pretrained(
                source.location, dtype=dtype, use_safetensors=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"cannot load model {source.location}: {reason}", param="model") from error
        nn.Module.to(self._network, self._device)
        self._network.eval()  # type: ignore[no-untyped-call]
        self.model_id = source.model_id
        self._encoder = PromptEncoder(self._tokenizer)
        self._context = context_tokens(self._network.config)
        self._pad = self._tokenizer.pad_token_id or 0
        self._ends = end_ids(self._network.generation_config, self._tokenizer)
        self._letters = self._letter_ids()
        self._max_batch = settings.max_batch
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="critique-model")

    async def ready(self) -> str | None:
        """The model is loaded when the process serves."""
        return None

    async def close(self) -> None:
        """End the model's thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def generate(self, prompts: Sequence[str], max_tokens: int) -> list[Text]:
        """Answer each prompt greedily. The limit shrinks to what the context leaves."""
        return await self._in_batches(
            prompts, lambda group: self._generate(group, max_tokens), lambda: Text("", "too_long")
        )

    async def choose(self, prompts: Sequence[str]) -> list[Letter | None]:
        """The likelier of the tokens A and B as the answer's first; None for a prompt over the context."""
        return await self._in_batches(prompts, self._choose, lambda: None)

    async def _in_batches(
        self,
        prompts: Sequence[str],
        work: Callable[[list[list[int]]], list[Result]],
        too_long: Callable[[], Result],
    ) -> list[Result]:
        """Run ``work`` on encoded prompts of similar length, in the model's thread; results in the prompts' order.

        Each group is a job of its own: of a request that is given up, what has not begun is never done.
        """
        in_thread = partial(asyncio.get_running_loop().run_in_executor, self._thread)
        every = await in_thread(lambda: [self._encode(prompt) for prompt in prompts])
        encoded = {index: ids for index, ids in enumerate(every) if ids}
        results: dict[int, Result] = {}
        for group in self._groups(sorted(encoded, key=lambda index: len(encoded[index]))):
            results.update(zip(group, await in_thread(work, [encoded[index] for index in group]), strict=True))
        return [results[index] if index in results else too_long() for index in range(len(prompts))]

    def _encode(self, prompt: str) -> list[int] | None:
        """Token ids of the prompt as a user's message; None when they leave no room for an answer."""
        if self._encoder.fewest_tokens([prompt]) >= self._context:
            return None
        ids = self._encoder.encode_chat([ChatMessage(role="user", content=prompt)])
        return ids if len(ids) < self._context else None

    def _groups(self, indices: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(indices), self._max_batch):
            yield indices[start : start + self._max_batch]

    @torch.inference_mode()
    def _generate(self, group: list[list[int]], max_tokens: int) -> list[Text]:
        ids_rt, mask_rt = self._padded(group)
        limit = min(max_tokens, self._context - ids_rt.shape[1])
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, max_new_tokens=limit, pad_token_id=self._pad, eos_token_id=sorted(self._ends)
        )
        output_rt = self._network.generate(input_ids=ids_rt, attention_mask=mask_rt, generation_config=config)
        return [self._text(row) for row in output_rt[:, ids_rt.shape[1] :].tolist()]

    def _text(self, ids: list[int]) -> Text:
        """Decode up to the end token. Other special tokens stay visible: the checks look for them."""
        end = next((place for place, token_id in enumerate(ids) if token_id in self._ends), None)
        text = self._tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Text(str(text), "cut_off" if end is None else "end")

    @torch.inference_mode()
    def _choose(self, group: list[list[int]]) -> list[Letter | None]:
        ids_rt, mask_rt = self._padded(group)
        positions_rt = (mask_rt.cumsum(dim=1) - 1).clamp(min=0)
        output = self._network(input_ids=ids_rt, attention_mask=mask_rt, position_ids=positions_rt, logits_to_keep=1)
        scores_r2 = output.logits[:, -1, self._letters].tolist()
        return ["A" if a > b else "B" if b > a else None for a, b in scores_r2]

    def _padded(self, group: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, padded on the left; both (r rows, t columns)."""
        width = max(len(ids) for ids in group)
        ids_rt = torch.tensor([[self._pad] * (width - len(ids)) + ids for ids in group])
        mask_rt = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in group])
        return ids_rt.to(self._device), mask_rt.to(self._device)

    def _letter_ids(self) -> list[int]:
        ids = [self._tokenizer(letter, add_special_tokens=False)["input_ids"][:1] for letter in ("A", "B")]
        if ids[0] == ids[1]:
            raise ConfigError(f"the tokenizer of {self.model_id} cannot tell A from B", param="model")
        return [int(i) for first in ids for i in first]
