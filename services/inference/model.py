"""Loading the base model: the shipped miniature, a folder, or any causal language model of the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from services.common.chat_prompts import PromptEncoder
from services.common.model_files import context_tokens, end_ids, locate_model, weights_sha256
from services.contracts.errors import ConfigError
from services.inference.settings import InferenceSettings
from services.inference.text import Detokenizer
from services.inference.vocabulary import Vocabulary


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model.

    Attributes:
        network: the model, in evaluation mode on its device.
        tokenizer: its tokenizer; used for decoding only.
        encoder: turns chats and texts into token ids.
        vocabulary: what single tokens are.
        model_id: the name it goes by.
        sha256: hash of its safetensors file (of the shards' hashes in order, when there are several).
        context_tokens: the most tokens that prompt and answer may have together.
        end_ids: token ids that end an answer.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    vocabulary: Vocabulary
    model_id: str
    sha256: str
    context_tokens: int
    end_ids: frozenset[int]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def detokenizer(self, before: Sequence[int]) -> Detokenizer:
        """For the text that continues these ids."""
        return Detokenizer(self.decode, before)


def load_base(settings: InferenceSettings) -> BaseModel:
    """Load the model that the settings name.

    Raises:
        ConfigError: the model, device or dtype cannot be had; the message says which.
    """
    torch.set_num_threads(settings.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    source = locate_model(settings.model)
    device = _device(settings.device)
    dtype = settings.dtype if settings.dtype != "auto" or device.type == "cuda" else "float32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location)
        network = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype, use_safetensors=True)
        digest = weights_sha256(source.location, cached_file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"cannot load model {source.location}: {str(error).splitlines()[0]}", param="model"
        ) from error
    nn.Module.to(network, device)
    network.eval()  # type: ignore[no-untyped-call]
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return BaseModel(
        network=network,
        tokenizer=tokenizer,
        encoder=PromptEncoder(tokenizer),
        vocabulary=Vocabulary(tokenizer),
        model_id=settings.model_id or source.model_id,
        sha256=digest,
        context_tokens=context_tokens(network.config),
        end_ids=end_ids(network.generation_config, tokenizer),
    )


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device is cuda, but torch sees no GPU; use --device cpu", param="device")
    return torch.device("cuda" if name != "cpu" and available else "cpu")
