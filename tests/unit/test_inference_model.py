"""Loading the base model, as a folder or a Hub snapshot has it."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from services.common.model_files import MINIATURE_ID, locate_model
from services.contracts.adapters import file_sha256
from services.contracts.errors import ConfigError
from services.inference.model import load_base
from services.inference.settings import InferenceSettings
from tests.fakes.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_base_knows_its_name_hash_and_limits(path: Path) -> None:
    base = load_base(InferenceSettings(model=str(path)))
    assert (base.model_id, base.sha256) == ("tiny", file_sha256(path / "model.safetensors"))
    assert (base.context_tokens, base.end_ids) == (128, frozenset({2}))
    assert base.network.dtype is torch.float32
    assert not base.network.training
    assert not any(parameter.requires_grad for parameter in base.network.parameters())


def test_name_and_dtype_can_be_set(path: Path) -> None:
    base = load_base(InferenceSettings(model=str(path), model_id="small", dtype="bfloat16"))
    assert (base.model_id, base.network.dtype) == ("small", torch.bfloat16)


def test_sharded_model_is_identified_by_its_shards(path: Path, tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1
    base = load_base(InferenceSettings(model=str(tmp_path / "sharded")))
    assert base.sha256 == hashlib.sha256("".join(map(file_sha256, shards)).encode()).hexdigest()


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load model"):
        load_base(InferenceSettings(model=str(tmp_path / "pickled")))


def test_broken_weights_are_named(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"cannot load model .*broken"):
        load_base(InferenceSettings(model=str(tmp_path / "broken")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU; use --device cpu"):
        load_base(InferenceSettings(model=str(path), device="cuda"))


def test_models_are_found_by_folder_hub_name_or_not_at_all(path: Path) -> None:
    assert locate_model(str(path)).model_id == "tiny"
    assert locate_model("org/some-model") == ("org/some-model", "some-model")
    assert locate_model(None).model_id == MINIATURE_ID
    for missing in ("/nowhere", "./nowhere", "~/nowhere", "a/b/c"):
        with pytest.raises(ConfigError, match="there is no such folder"):
            locate_model(missing)
