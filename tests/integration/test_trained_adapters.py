"""Adapters that a federation has trained, on their way into service: loaded over HTTP, they answer as PEFT does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.fakes.model_servers import serving_inference
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import LocalGrid, small_run
from trainer.server_app import train_federation

PROMPT = "How do I bake bread?"
TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("trained") / "tiny")


@pytest.fixture(scope="module")
def adapters(model: Path) -> Path:
    """The adapters of a federation of two rounds, one folder for each round."""
    config = small_run(model.parent, model, learning_rate=0.05, local_epochs=4)
    train_federation(LocalGrid(config, range(config.num_clients)), config)
    return config.run_dir / "adapters"


@pytest.fixture(scope="module")
def http(model: Path, adapters: Path) -> Iterator[httpx.Client]:
    with serving_inference(model, adapters_dir=adapters) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


def generate(http: httpx.Client, adapter: str) -> list[dict[str, Any]]:
    """The tokens of a greedy answer, each with its log-probability."""
    parameters = {"max_new_tokens": TOKENS, "details": True, "adapter_id": adapter}
    answer = http.post("/generate", json={"inputs": PROMPT, "parameters": parameters}).raise_for_status().json()
    tokens: list[dict[str, Any]] = answer["details"]["tokens"]
    return tokens


def peft_logprobs(model: Path, adapter: Path, ids: list[int]) -> torch.Tensor:
    """What PEFT's own network with the adapter thinks of each of the given answer's tokens; (t,)."""
    prompt = AutoTokenizer.from_pretrained(model)(PROMPT)["input_ids"]
    network = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model), str(adapter)).eval()
    with torch.inference_mode():
        logits_tv = network(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    assert logits_tv.argmax(dim=-1).tolist() == ids, "PEFT would have chosen other tokens"
    return torch.log_softmax(logits_tv, dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["round-0", "round-1", "round-2"])
def test_trained_adapter_answers_as_peft_does(http: httpx.Client, model: Path, adapters: Path, name: str) -> None:
    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name})
    assert loaded.status_code == 200, loaded.text
    tokens = generate(http, name)
    expected = peft_logprobs(model, adapters / name, [token["id"] for token in tokens])
    torch.testing.assert_close(torch.tensor([token["logprob"] for token in tokens]), expected, rtol=1e-4, atol=1e-4)


def test_training_changes_the_answer_and_round_0_does_not(http: httpx.Client) -> None:
    for name in ("round-0", "round-2"):
        http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name}).raise_for_status()
    start, end, base = ([token["id"] for token in generate(http, name)] for name in ("round-0", "round-2", "tiny"))
    assert start == base
    assert end != base
