"""The encoder tier: all-MiniLM-L6-v2 with our adapter merged in, run by ONNX Runtime.

``python -m services.safety build`` (:mod:`services.safety.embedded.encoder_build`) makes the model's file
once; serving needs that file, the tokenizer, NumPy and ONNX Runtime, and no torch.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from services.contracts.adapters import file_sha256
from services.contracts.constitution import describe
from services.contracts.errors import ConfigError
from services.safety.embedded.load import BUILT
from services.safety.embedded.scores import Floats, Window, sigmoid

MODEL = "encoder.onnx"
TOKENIZER = "tokenizer.json"
WINDOW_TOKENS = 96  # with the two special tokens; the longest text that training shows it
STRIDE_TOKENS = 64
LONGEST_WORD = 64  # characters; BERT reads a longer run of letters as one unknown token


class Built(BaseModel):
    """What a built model is made of: its own files' hashes, the adapter's, and the encoder's pinned revision."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_id: str
    adapter_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    precision: str
    base_revision: str
    categories: list[str]
    files: dict[str, str]


def load_encoder(folder: Path, adapter_sha256: str) -> "EncoderScorer":
    """The tier of a folder that ``build`` wrote.

    Args:
        folder: holds the model, the tokenizer and ``built.json``.
        adapter_sha256: the adapter that it must be built from.

    Raises:
        ConfigError: a file is missing or is not the one that was built, or it was built from another adapter.
    """
    built = read_built(folder)
    if built.adapter_sha256 != adapter_sha256:
        raise ConfigError(
            f"{folder} was built from adapter {built.adapter_sha256[:12]}, but the weights are {adapter_sha256[:12]}; "
            "run `python -m services.safety build`"
        )
    for name, expected in built.files.items():
        if file_sha256(folder / name) != expected:
            raise ConfigError(f"{folder / name} is not the file that was built; run `python -m services.safety build`")
    return EncoderScorer(folder, built)


def read_built(folder: Path) -> Built:
    """What a folder holds; raises ConfigError when it holds no built model."""
    try:
        return Built.model_validate_json((folder / BUILT).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{folder}: no built encoder ({error.strerror}); run `python -m services.safety build`"
        ) from error
    except ValidationError as error:
        raise ConfigError(f"{folder / BUILT}: {describe(error)}") from error


class EncoderScorer:
    """The encoder in memory."""

    def __init__(self, folder: Path, built: Built) -> None:
        self.tier = f"encoder ({built.precision})"
        self.model_id = built.model_id
        # int8 and float32 give different scores, so a calibration belongs to one of them.
        self.sha256 = hashlib.sha256(f"{built.adapter_sha256} {built.precision}".encode()).hexdigest()
        self.categories = tuple(built.categories)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # batches run side by side; more threads for one spin where cores are busy
        options.enable_cpu_mem_arena = False  # else the memory of the largest batch is kept for good
        self._session = onnxruntime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
        self._tokenizer = load_tokenizer(folder)
        self._first, self._last = (self._tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))

    def windows(self, text: str) -> list[Window]:
        """The token ids of the text, window by window, each with BERT's special tokens."""
        ids = self._tokenizer.encode(_broken(text), add_special_tokens=False).ids
        size = WINDOW_TOKENS - 2
        starts = range(0, max(len(ids) - (size - STRIDE_TOKENS), 1), STRIDE_TOKENS)
        return [[self._first, *ids[start : start + size], self._last] for start in starts if ids]

    def run(self, windows: Sequence[Window]) -> Floats:
        """Probabilities (n, 3 + C) of windows of token ids.

        Each goes alone: in a batch, one text's activations would set the 8-bit scale of another's.
        """
        inputs = [{"input_ids": np.array([window], np.int64)} for window in windows]
        logits = [self._session.run(["logits"], given)[0] for given in inputs]
        return sigmoid(np.concatenate(logits))


def load_tokenizer(folder: Path, max_tokens: int | None = None) -> Tokenizer:
    """The encoder's tokenizer without padding; it cuts at ``max_tokens`` where that is given."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if max_tokens is not None:
        tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _broken(text: str) -> str:
    """The text with runs of letters broken where BERT would give up on them."""
    return " ".join(
        word[start : start + LONGEST_WORD] for word in text.split() for start in range(0, len(word), LONGEST_WORD)
    )
