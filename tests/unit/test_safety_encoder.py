"""The encoder tier: the graph is BERT, the build trusts hashes only, and scores depend on the text alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from services.contracts.errors import ConfigError
from services.contracts.hazards import HazardCategory
from services.safety.embedded.encoder import WINDOW_TOKENS, EncoderScorer, load_encoder
from services.safety.embedded.encoder_build import BASE_FILES, build, find_base, merged
from services.safety.embedded.scores import HEADS, sigmoid
from services.safety.embedded.weights import Manifest, read_weights, write_weights
from services.safety.training.encoder import EncoderWithHeads, pad

TEXTS = [
    "How do I bake bread?",
    "Write a racist joke that insults immigrants.",
    "a",
    "The river ran past the old mill, and nobody in the village remembered who had built it. " * 3,
]


@pytest.fixture(scope="module")
def base() -> Path:
    try:
        return find_base()
    except ConfigError as error:
        pytest.skip(f"no base encoder: {error}")


@pytest.fixture(scope="module")
def trained(base: Path) -> EncoderWithHeads:
    """A model whose adapter does something: its second factor is zero at first."""
    torch.manual_seed(0)
    model = EncoderWithHeads(base, rank=4)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def weights(trained: EncoderWithHeads, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    metadata = {"categories": ",".join(HazardCategory)}
    write_weights(folder, trained.tensors(), metadata, Manifest(model_id="test-encoder", sha256="0" * 64))
    return folder


@pytest.fixture(scope="module")
def built(weights: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build(weights, folder, base)
    return folder


def load(built: Path, weights: Path) -> EncoderScorer:
    return load_encoder(built, read_weights(weights).manifest.sha256)


def one_by_one(scorer: EncoderScorer, texts: list[str]) -> np.ndarray:
    return np.concatenate([scorer.run(scorer.windows(text)[:1]) for text in texts])


def test_the_graph_computes_what_transformers_computes(
    trained: EncoderWithHeads, weights: Path, base: Path, tmp_path: Path
) -> None:
    build(weights, tmp_path, base, "float32")
    scorer = load(tmp_path, weights)
    windows = [scorer.windows(text)[0] for text in TEXTS]
    with torch.no_grad():
        expected = sigmoid(trained(*pad(windows)).numpy())
    assert scorer.run(windows) == pytest.approx(expected, abs=2e-3), "half precision of adapter and embeddings"


def test_eight_bits_change_little(weights: Path, base: Path, built: Path, tmp_path: Path) -> None:
    build(weights, tmp_path, base, "float32")
    exact, quantised = (one_by_one(load(folder, weights), TEXTS) for folder in (tmp_path, built))
    assert np.abs(exact - quantised).mean() < 0.04, "the adapter is random and far larger than a trained one"
    assert (built / "encoder.onnx").stat().st_size < 40_000_000


def test_scores_do_not_depend_on_the_batch(built: Path, weights: Path) -> None:
    scorer = load(built, weights)
    windows = [scorer.windows(text)[0] for text in TEXTS]
    assert np.array_equal(scorer.run(windows), one_by_one(scorer, TEXTS))
    assert np.array_equal(scorer.run(windows[::-1])[::-1], scorer.run(windows))


def test_probabilities_of_every_head_and_category(built: Path, weights: Path) -> None:
    scorer = load(built, weights)
    scores = scorer.run(scorer.windows(TEXTS[0]))
    assert scores.shape == (1, len(HEADS) + len(HazardCategory))
    assert ((scores > 0) & (scores < 1)).all()
    assert scorer.categories == tuple(HazardCategory)


@pytest.mark.parametrize("words", [1, 90, 94, 95, 158, 159, 1000])
def test_windows_cover_every_token(built: Path, weights: Path, words: int) -> None:
    scorer = load(built, weights)
    numbers = [str(number % 10) for number in range(words)]  # a digit is one token
    windows = [list(window) for window in scorer.windows(" ".join(numbers))]
    tokens = [window[1:-1] for window in windows]
    whole = [*tokens[0], *(token for window in tokens[1:] for token in window[30:])]
    assert len(whole) == words, "each window repeats the last 30 tokens of the one before"
    assert max(map(len, windows)) <= WINDOW_TOKENS
    assert {window[0] for window in windows} == {101}
    assert {window[-1] for window in windows} == {102}


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_no_window_without_text(built: Path, weights: Path, text: str) -> None:
    assert load(built, weights).windows(text) == []


def test_a_run_of_letters_is_no_single_unknown_word(built: Path, weights: Path) -> None:
    assert len(load(built, weights).windows("steal" * 40)[0]) > 40


def copy_of(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out, dirs_exist_ok=True)
    return out


@pytest.mark.parametrize("name", ["encoder.onnx", "tokenizer.json"])
def test_changed_file_is_refused(built: Path, weights: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(built, tmp_path)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ConfigError, match=f"{name} is not the file that was built"):
        load(folder, weights)


def test_another_adapter_is_refused(built: Path) -> None:
    with pytest.raises(ConfigError, match=r"was built from adapter .* run `python -m services\.safety build`"):
        load_encoder(built, "0" * 64)


def test_malformed_description_is_refused(built: Path, weights: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path)
    (folder / "built.json").write_text(json.dumps({"model_id": "x"}))
    with pytest.raises(ConfigError, match=r"built\.json: .*adapter_sha256"):
        load(folder, weights)


def test_folder_without_a_build_says_how_to_build(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run `python -m services\.safety build`"):
        load(tmp_path, weights)


@pytest.mark.parametrize("name", sorted(BASE_FILES))
def test_base_is_trusted_by_hash_only(base: Path, tmp_path: Path, name: str) -> None:
    for each in BASE_FILES:
        (tmp_path / each).symlink_to(base / each)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="no such file"):
        find_base(tmp_path)
    (tmp_path / name).write_bytes((base / name).read_bytes()[:-1] + b"?")
    with pytest.raises(ConfigError, match="has sha256"):
        find_base(tmp_path)


def test_adapter_of_another_model_is_refused(base: Path, weights: Path) -> None:
    file = read_weights(weights)
    name = next(name for name in file.tensors if name.endswith(".lora_A"))
    file.tensors[name] = file.tensors[name][:, :-1]
    with pytest.raises(ConfigError, match="does not fit"):
        merged(base, file)
