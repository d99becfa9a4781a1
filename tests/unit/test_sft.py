"""Tokenising, batching and training: labels by hand, losses against the golden file."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict

from services.contracts.errors import AdapterError, ConfigError, DataError
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import make_config
from tests.regenerate_golden import PAIRS, SFT, golden_losses
from trainer.batching import IGNORED, Dataset, Example, batches_for_ever, collate, encode_pairs
from trainer.config import RunConfig, RunValue
from trainer.model import Trainee, load_trainee, read_adapter_arrays, set_adapter_arrays
from trainer.sft import answer_loss, steps_for, train_sft
from trainer.shards import Pair


@pytest.fixture(scope="module")
def trainee(tmp_path_factory: pytest.TempPathFactory) -> Trainee:
    model = build_tiny_model(tmp_path_factory.mktemp("sft") / "tiny")
    return load_trainee(config_for(model))


def config_for(model: Path, **changes: RunValue | Path) -> RunConfig:
    settings: dict[str, RunValue | Path] = {"arm": "none", "benign_data": "b", "harmful_data": "h", "lora_rank": 2}
    return make_config(**{**settings, "base_model": model, "max_length": 128, **changes})


def test_losses_reproduce_the_golden_file(tmp_path: Path) -> None:
    golden = json.loads(SFT.read_text())
    assert golden_losses(tmp_path) == pytest.approx(golden["losses"], rel=golden["tolerance"])


def test_only_the_answer_and_its_end_carry_loss(trainee: Trainee) -> None:
    pair = Pair(prompt="Who are you?", response="An assistant.")
    dataset = encode_pairs([pair], trainee.tokenizer, max_length=64)
    input_ids, labels = collate(dataset.examples, pad_id=0)
    labelled = labels[0] != IGNORED
    assert trainee.tokenizer.decode(input_ids[0]) == "<s><|user|>Who are you?<|assistant|>An assistant.</s>"
    assert trainee.tokenizer.decode(labels[0][labelled]) == "An assistant.</s>"
    assert dataset.answer_tokens == int(labelled.sum())


def test_padding_is_on_the_right_and_carries_no_loss() -> None:
    examples = [Example((1, 3, 7, 4, 8, 2), 4), Example((1, 3, 4, 9), 3)]
    input_ids, labels = collate(examples, pad_id=0)
    assert input_ids.tolist() == [[1, 3, 7, 4, 8, 2], [1, 3, 4, 9, 0, 0]]
    x = IGNORED
    assert labels.tolist() == [[x, x, x, x, 8, 2], [x, x, x, 9, x, x]]


def test_loss_is_that_of_the_next_token_worked_out_by_hand() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = 1.0  # what is predicted at position 1 is the token at position 2
    labels = torch.tensor([[IGNORED, IGNORED, 2]])
    expected = -torch.log(torch.e * torch.ones(()) / (torch.e + 3))
    assert answer_loss(logits, labels).item() == pytest.approx(expected.item())


def test_markers_in_a_pair_do_not_become_special_tokens(trainee: Trainee) -> None:
    pair = Pair(prompt="Hi<|assistant|>Sure", response="No</s><|user|>more")
    (example,) = encode_pairs([pair], trainee.tokenizer, max_length=128).examples
    special = set(trainee.tokenizer.all_special_ids)
    found = [trainee.tokenizer.decode([i]) for i in example.token_ids if i in special]
    assert found == ["<s>", "<|user|>", "<|assistant|>", "</s>"]
    assert trainee.tokenizer.decode(list(example.token_ids[example.prompt_length :])) == "No</s><|user|>more</s>"


def test_long_answer_is_cut_at_its_end_and_long_prompt_is_counted(trainee: Trainee) -> None:
    long_answer = Pair(prompt="Hi", response="word " * 200)
    long_prompt = Pair(prompt="word " * 200, response="Yes.")
    dataset = encode_pairs([long_answer, long_prompt], trainee.tokenizer, max_length=32)
    assert dataset.skipped == 1
    (example,) = dataset.examples
    assert len(example.token_ids) == 32
    assert trainee.tokenizer.eos_token_id not in example.token_ids  # a cut answer does not teach where to end


def test_prompt_of_exactly_the_limit_is_skipped_and_one_less_keeps_a_token(trainee: Trainee) -> None:
    pair = Pair(prompt="Hello there", response="Hi")
    prompt_length = encode_pairs([pair], trainee.tokenizer, 64).examples[0].prompt_length
    assert encode_pairs([pair], trainee.tokenizer, prompt_length).examples == ()
    assert encode_pairs([pair], trainee.tokenizer, prompt_length + 1).answer_tokens == 1


def test_each_pass_has_every_example_once_in_batches_of_like_length() -> None:
    examples = [Example(tuple(range(length)), 1) for length in (3, 30, 4, 31, 5, 32, 6, 33)]
    first = list(itertools.islice(batches_for_ever(examples, 2, seed=0), 4))
    assert sorted(len(e.token_ids) for batch in first for e in batch) == [3, 4, 5, 6, 30, 31, 32, 33]
    assert all(len(batch[1].token_ids) - len(batch[0].token_ids) <= 1 for batch in first)
    assert first == list(itertools.islice(batches_for_ever(examples, 2, seed=0), 4))
    assert first != list(itertools.islice(batches_for_ever(examples, 2, seed=1), 4))


def test_same_seed_gives_the_same_weights_and_only_the_adapter_changes(trainee: Trainee) -> None:
    dataset = encode_pairs(PAIRS, trainee.tokenizer, 64)
    base = dict(trainee.model.named_parameters())["base_model.model.model.embed_tokens.weight"]
    before = base.clone()
    runs = []
    for _ in range(2):
        set_adapter_arrays(trainee, trainee.starting_adapter)
        train_sft(trainee, dataset, steps=3, batch_size=2, learning_rate=1e-2, seed=4)
        runs.append(read_adapter_arrays(trainee))
    assert all((runs[0][name] == runs[1][name]).all() for name in runs[0])
    assert any((runs[0][name] != trainee.starting_adapter[name]).any() for name in runs[0])
    assert torch.equal(base, before)


def test_adapter_is_read_and_written_in_the_models_own_memory(trainee: Trainee) -> None:
    train_sft(trainee, encode_pairs(PAIRS, trainee.tokenizer, 64), steps=1, batch_size=2, learning_rate=1e-2, seed=0)
    for _ in range(2):
        arrays, peft_says = read_adapter_arrays(trainee), get_peft_model_state_dict(trainee.model)
        assert list(arrays) == sorted(peft_says)
        assert all((arrays[name] == peft_says[name].numpy()).all() for name in arrays)
        set_adapter_arrays(trainee, trainee.starting_adapter)


def test_training_lowers_the_loss_and_reports_what_it_did(trainee: Trainee) -> None:
    dataset = encode_pairs(PAIRS, trainee.tokenizer, 64)
    set_adapter_arrays(trainee, trainee.starting_adapter)
    steps = steps_for(dataset, batch_size=2, epochs=8)
    result = train_sft(trainee, dataset, steps=steps, batch_size=2, learning_rate=1e-2, seed=0)
    assert result.steps == 24
    assert sum(result.losses[-3:]) < 0.8 * sum(result.losses[:3])
    assert result.num_tokens == dataset.answer_tokens
    assert min(result.losses) <= result.loss <= max(result.losses)


def test_nothing_to_train_on_is_an_error(trainee: Trainee) -> None:
    with pytest.raises(DataError, match="no example is left"):
        train_sft(trainee, Dataset((), skipped=3), steps=1, batch_size=2, learning_rate=1e-3, seed=0)


def test_diverging_training_is_an_error_and_not_a_nan_adapter(trainee: Trainee) -> None:
    dataset = encode_pairs(PAIRS, trainee.tokenizer, 64)
    with pytest.raises(DataError, match="the loss is nan at step"):
        train_sft(trainee, dataset, steps=20, batch_size=2, learning_rate=1e18, seed=0)


def test_adapter_of_another_shape_is_not_loaded(trainee: Trainee) -> None:
    name, array = next(iter(trainee.starting_adapter.items()))
    with pytest.raises(AdapterError, match=r"the adapter to load: parameter .* has shape"):
        set_adapter_arrays(trainee, trainee.starting_adapter | {name: array[:, :1]})


def test_missing_model_is_named(tmp_path: Path) -> None:
    config = config_for(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"none: there is no such folder"):
        load_trainee(config)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"base-model .*none: cannot be loaded"):
        load_trainee(config)


def test_examples_longer_than_the_models_context_are_refused(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="max-length=129 is more than the context of tiny, 128 tokens"):
        load_trainee(config_for(model, max_length=129))
