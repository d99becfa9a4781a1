"""Adapters: merged as PEFT computes them, refused when anything is wrong, released and rolled back atomically."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from services.contracts.adapters import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    CanaryRequest,
    LoadAdapterRequest,
    check_config,
    file_sha256,
)
from services.contracts.errors import AdapterError, AdapterHashMismatch, RequestError, UnknownModel
from services.inference.adapters import Adapters
from services.inference.generation import Variant
from services.inference.lora import merge_adapter
from services.inference.model import BaseModel, load_base
from services.inference.settings import InferenceSettings
from tests.fakes.tiny_model import build_tiny_adapter, build_tiny_model, write_manifest

IDS = torch.tensor([[1, 3, 70, 71, 72, 4]])
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("adapters") / "tiny")


@pytest.fixture(scope="module")
def base(model_path: Path) -> BaseModel:
    return load_base(InferenceSettings(model=str(model_path)))


@pytest.fixture
def adapters(base: BaseModel, tmp_path: Path) -> Adapters:
    variant = Variant(base.model_id, base.sha256, base.network)
    return Adapters(variant, served_name="fedward", directory=tmp_path, limit=3)


def build(tmp_path: Path, model_path: Path, name: str = "r1", seed: int = 1) -> str:
    return build_tiny_adapter(tmp_path / name, model_path, seed=seed)


def load(adapters: Adapters, name: str, path: str | None = None, sha256: str | None = None) -> Variant:
    return adapters.load(LoadAdapterRequest(lora_name=name, lora_path=path or name, sha256=sha256))


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = network(input_ids=IDS).logits
    return output


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_network_answers_as_peft_does(base: BaseModel, model_path: Path, tmp_path: Path, rslora: bool) -> None:
    sha256 = build(tmp_path, model_path)
    config = json.loads((tmp_path / "r1" / CONFIG).read_text())
    (tmp_path / "r1" / CONFIG).write_text(json.dumps(config | {"use_rslora": rslora, "task_type": "CAUSAL_LM"}))
    before = logits(base.network)
    merged = logits(merge_adapter(base.network, tmp_path / "r1", sha256))
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_path), str(tmp_path / "r1")).eval()
    torch.testing.assert_close(merged, logits(reference), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, before)
    torch.testing.assert_close(logits(base.network), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_that_peft_has_written_is_taken(base: BaseModel, model_path: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    trained = get_peft_model(LlamaForCausalLM.from_pretrained(model_path), config).eval()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(str(tmp_path / "r1"))
    merged = merge_adapter(base.network, tmp_path / "r1", file_sha256(tmp_path / "r1" / WEIGHTS))
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-4, atol=1e-4)


def test_merged_network_shares_what_the_adapter_leaves_alone(base: BaseModel, model_path: Path, tmp_path: Path) -> None:
    merged = merge_adapter(base.network, tmp_path / "r1", build(tmp_path, model_path))
    changed = [
        name
        for (name, mine), theirs in zip(merged.named_parameters(), base.network.parameters(), strict=True)
        if mine is not theirs
    ]
    assert len(changed) == 4
    assert all("q_proj" in name or "v_proj" in name for name in changed)


def rewrite(path: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(path / WEIGHTS)
    change(weights)
    save_file(weights, path / WEIGHTS)
    manifest = json.loads((path / MANIFEST).read_text())
    write_manifest(path, base_sha256=manifest["base_model_sha256"])


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
BAD_WEIGHTS: dict[str, tuple[Callable[[Weights], object], str]] = {
    "NaN": (lambda w: w[f"{Q0}.lora_A.weight"].fill_(float("nan")), "not finite"),
    "infinity": (lambda w: w[f"{Q0}.lora_B.weight"].fill_(float("inf")), "not finite"),
    "overflow": (lambda w: [t.fill_(1e30) for t in w.values()], "becomes NaN or infinite"),
    "shape": (lambda w: w.update({f"{Q0}.lora_A.weight": torch.zeros(4, 31)}), r"q_proj.lora_A has shape \(4, 31\)"),
    "rank": (lambda w: w.update({f"{Q0}.lora_A.weight": torch.zeros(2, 32)}), r"the base model needs \(4, 32\)"),
    "dtype": (lambda w: w.update({f"{Q0}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int32)}), "int32"),
    "name": (lambda w: w.update({"lm_head.weight": torch.zeros(2, 2)}), "lm_head.weight is not the name"),
    "no such layer": (
        lambda w: w.update({f"{Q0.replace('0', '9')}.lora_{h}.weight": torch.zeros(4, 32) for h in "AB"}),
        "has weights for model.layers.9",
    ),
    "half a pair": (lambda w: w.pop(f"{Q0}.lora_B.weight"), "lacks its lora_A or lora_B"),
    "missing layer": (lambda w: [w.pop(f"{Q0}.lora_{h}.weight") for h in "AB"], "lacks weights for"),
    "empty": (lambda w: w.clear(), "every layer lacks"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_wrong_weights_are_refused_and_nothing_changes(
    adapters: Adapters, model_path: Path, tmp_path: Path, case: str
) -> None:
    build(tmp_path, model_path)
    good = load(adapters, "r1")
    change, message = BAD_WEIGHTS[case]
    rewrite(tmp_path / "r1", change)
    with pytest.raises(AdapterError, match=message):
        load(adapters, "r1")
    assert adapters.find("r1") is good


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"bias": "all"}, "without trained biases"),
        ({"use_dora": True}, "cannot serve an adapter with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"r": 0}, "r must be"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": "("}, "not a pattern"),
        ({"r": 8}, "the base model needs"),
    ],
)
def test_other_than_plain_lora_is_refused_by_name(
    adapters: Adapters, model_path: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    build(tmp_path, model_path)
    config = json.loads((tmp_path / "r1" / CONFIG).read_text())
    (tmp_path / "r1" / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=message):
        load(adapters, "r1")
    assert "r1" not in adapters.variants()


@pytest.mark.parametrize("content", ["{", "[]", "null", '"x"'])
def test_broken_config_is_refused(adapters: Adapters, model_path: Path, tmp_path: Path, content: str) -> None:
    build(tmp_path, model_path)
    (tmp_path / "r1" / CONFIG).write_text(content)
    with pytest.raises(AdapterError, match=CONFIG):
        load(adapters, "r1")


def test_weights_that_are_no_safetensors_are_refused(adapters: Adapters, model_path: Path, tmp_path: Path) -> None:
    build(tmp_path, model_path)
    (tmp_path / "r1" / WEIGHTS).write_bytes(b"not a tensor file")
    write_manifest(tmp_path / "r1", base_sha256=file_sha256(model_path / "model.safetensors"))
    with pytest.raises(AdapterError, match="not a safetensors file"):
        load(adapters, "r1")


def test_wrong_hashes_are_refused(adapters: Adapters, model_path: Path, tmp_path: Path) -> None:
    sha256 = build(tmp_path, model_path)
    with pytest.raises(AdapterHashMismatch, match="the request says 0000"):
        load(adapters, "r1", sha256="0" * 64)
    with pytest.raises(AdapterHashMismatch, match="changed while it was read"):
        merge_adapter(adapters.find("fedward").network, tmp_path / "r1", "0" * 64)
    (tmp_path / "r1" / WEIGHTS).write_bytes(b"tampered")
    with pytest.raises(AdapterHashMismatch, match=f"manifest.json says {sha256}"):
        load(adapters, "r1")


def test_adapter_of_another_base_is_refused(adapters: Adapters, model_path: Path, tmp_path: Path) -> None:
    build(tmp_path, model_path)
    write_manifest(tmp_path / "r1", base_sha256="f" * 64)
    with pytest.raises(AdapterError, match=r"trained on a base model with sha256 f+; this service runs tiny"):
        load(adapters, "r1")


@pytest.mark.parametrize("path", ["../r1", "/etc", "r1/../../r1"])
def test_path_outside_the_adapters_folder_is_refused(
    base: BaseModel, model_path: Path, tmp_path: Path, path: str
) -> None:
    build(tmp_path, model_path)
    (tmp_path / "inside").mkdir()
    variant = Variant(base.model_id, base.sha256, base.network)
    adapters = Adapters(variant, served_name="fedward", directory=tmp_path / "inside", limit=3)
    with pytest.raises(AdapterError, match="lies outside the folder"):
        load(adapters, "r1", path)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "a\nb"])
def test_unprintable_path_is_refused(adapters: Adapters, path: str) -> None:
    with pytest.raises(AdapterError, match="not printable"):
        load(adapters, "r1", path)


def test_link_out_of_the_adapters_folder_is_refused(adapters: Adapters, model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "r1").symlink_to(model_path)
    with pytest.raises(AdapterError, match="lies outside the folder"):
        load(adapters, "r1")


def test_missing_folder_and_taken_names_are_refused(adapters: Adapters) -> None:
    with pytest.raises(AdapterError, match=f"{WEIGHTS} is missing"):
        load(adapters, "r1")
    for name in ("fedward", "tiny"):
        with pytest.raises(AdapterError, match="choose another"):
            load(adapters, name)


def test_number_of_adapters_is_bounded(adapters: Adapters, model_path: Path, tmp_path: Path) -> None:
    build(tmp_path, model_path)
    for name in ("a", "b", "c", "a"):
        load(adapters, name, "r1")
    with pytest.raises(AdapterError, match="3 adapters are loaded, which is the limit"):
        load(adapters, "d", "r1")


def test_names_lead_to_their_variants(adapters: Adapters, base: BaseModel, model_path: Path, tmp_path: Path) -> None:
    sha256 = build(tmp_path, model_path)
    load(adapters, "r1", sha256=sha256)
    assert adapters.find("fedward").sha256 == adapters.find("tiny").sha256 == base.sha256
    assert adapters.find("r1").sha256 == sha256
    with pytest.raises(UnknownModel, match=r"model 'gpt' is not loaded; known: fedward, tiny, r1"):
        adapters.find("gpt")


def test_release_is_activated_replaced_and_rolled_back(adapters: Adapters, model_path: Path, tmp_path: Path) -> None:
    first, second = build(tmp_path, model_path, "r1", 1), build(tmp_path, model_path, "r2", 2)
    load(adapters, "r1")
    load(adapters, "r2")
    with pytest.raises(AdapterHashMismatch, match="r1 is loaded with sha256"):
        adapters.activate("r1", second)
    with pytest.raises(RequestError, match="no earlier release"):
        adapters.roll_back()
    assert adapters.activate("r1", first).previous == "tiny"
    assert adapters.activate("r2", second).model_dump() == {
        "served_model": "fedward",
        "adapter": "r2",
        "sha256": second,
        "previous": "r1",
        "canary": None,
    }
    assert adapters.activate("r2", second).previous == "r1"  # doing it again changes nothing
    assert adapters.find("fedward").sha256 == second
    assert adapters.roll_back().model_dump() == {
        "served_model": "fedward",
        "adapter": "r1",
        "sha256": first,
        "previous": None,
        "canary": None,
    }
    assert adapters.find("fedward").sha256 == first


def test_unloading_spares_the_release_and_its_predecessor_can_come_back(
    adapters: Adapters, model_path: Path, tmp_path: Path
) -> None:
    first, second = build(tmp_path, model_path, "r1", 1), build(tmp_path, model_path, "r2", 2)
    load(adapters, "r1")
    load(adapters, "r2")
    adapters.activate("r1", first)
    adapters.activate("r2", second)
    with pytest.raises(RequestError, match="r2 is the active release"):
        adapters.unload("r2")
    adapters.unload("r1")
    with pytest.raises(UnknownModel, match=r"'r1' is not loaded; loaded: r2"):
        adapters.unload("r1")
    adapters.roll_back()
    assert adapters.find("r1").sha256 == first


def test_replacing_a_name_leaves_the_release_as_it_was(adapters: Adapters, model_path: Path, tmp_path: Path) -> None:
    first, second = build(tmp_path, model_path, "r1", 1), build(tmp_path, model_path, "r2", 2)
    load(adapters, "now", "r1")
    adapters.activate("now", first)
    load(adapters, "now", "r2")
    assert adapters.find("now").sha256 == second
    assert adapters.find("fedward").sha256 == first
    assert adapters.release().sha256 == first


def test_canary_gets_its_share_of_the_requests(adapters: Adapters, model_path: Path, tmp_path: Path) -> None:
    sha256 = build(tmp_path, model_path)
    load(adapters, "r1")
    for percent in (1.0, 25.0, 100.0):
        adapters.start_canary(CanaryRequest(lora_name="r1", sha256=sha256, percent=percent))
        sides = [adapters.find("fedward", f"request-{n}").sha256 == sha256 for n in range(4000)]
        assert 100 * sum(sides) / 4000 == pytest.approx(percent, abs=2)
    assert adapters.find("fedward").sha256 == sha256
    assert adapters.find("tiny", "request-1").sha256 != sha256


def test_two_candidates_get_different_requests(adapters: Adapters, model_path: Path, tmp_path: Path) -> None:
    def share(name: str, sha256: str) -> set[int]:
        load(adapters, name)
        adapters.start_canary(CanaryRequest(lora_name=name, sha256=sha256, percent=10))
        return {n for n in range(500) if adapters.find("fedward", str(n)).name == name}

    first = share("r1", build(tmp_path, model_path, "r1", 1))
    second = share("r2", build(tmp_path, model_path, "r2", 2))
    assert len(first & second) < min(len(first), len(second)) / 2


def test_configuration_that_changes_after_the_check_is_noticed(
    base: BaseModel, model_path: Path, tmp_path: Path
) -> None:
    sha256 = build_tiny_adapter(tmp_path / "r1", model_path, seed=1, pinned=True)
    (tmp_path / "r1" / CONFIG).write_text(
        (tmp_path / "r1" / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": 80')
    )
    with pytest.raises(AdapterHashMismatch, match=r"adapter_model\.safetensors pins"):
        merge_adapter(base.network, tmp_path / "r1", sha256)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_adapter_of_another_writer_pins_nothing_and_is_taken(
    adapters: Adapters, model_path: Path, tmp_path: Path, metadata: dict[str, str]
) -> None:
    build(tmp_path, model_path)
    save_file(load_file(tmp_path / "r1" / WEIGHTS), tmp_path / "r1" / WEIGHTS, metadata=metadata)
    write_manifest(tmp_path / "r1", base_sha256=file_sha256(model_path / "model.safetensors"))
    assert load(adapters, "r1").sha256 == file_sha256(tmp_path / "r1" / WEIGHTS)


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"\xff" * 9, b"\x02" + b"\0" * 7 + b"[]", (10**6).to_bytes(8, "little") + b"[" * 10**6]
)
def test_weights_that_are_no_safetensors_pin_nothing(tmp_path: Path, content: bytes) -> None:
    check_config(tmp_path, io.BytesIO(content), b"{}")
