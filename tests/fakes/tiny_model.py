"""A tiny random Llama with a byte-level tokenizer, and LoRA adapters for it: real files, loaded by the real code."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from services.contracts.adapters import CONFIG, CONFIG_PIN, MANIFEST, WEIGHTS, AdapterManifest, file_sha256

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'tool' %}{{ raise_exception('tools are not supported') }}"
    "{% else %}<|user|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SAMPLE = [
    "How do I bake bread? Mix flour, water, salt and yeast, let the dough rise, then bake it.",
    "Why is the sky blue? Because the air scatters blue light more than red light.",
    "Grüße aus Zürich: naïve café, 東京, 🙂🚀, and a few words more.",
    "Problem: the answer could hurt someone. No problem: the answer is harmless. A or B?",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Fedward's special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE * 4, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
        model_max_length=128,
    )


def build_tiny_model(path: Path, *, seed: int = 0) -> Path:
    """Write a random fp32 Llama (2 layers, width 32, context 128) and its tokenizer to ``path``."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        # Wide weights: the logits of neighbouring tokens lie far apart, so that padding's rounding flips no choice.
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def build_tiny_adapter(
    path: Path, model: Path, *, seed: int, rank: int = 4, round_number: int = 1, pinned: bool = False
) -> str:
    """Write a random LoRA adapter for the model at ``model`` to ``path``; the answer is its sha256.

    ``pinned``: its weights pin its configuration, as the trainer's do.
    """
    path.mkdir(parents=True, exist_ok=True)
    base = LlamaForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            assert isinstance(module, torch.nn.Linear)
            prefix = f"base_model.model.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    (path / CONFIG).write_text(json.dumps(config))
    save_file(weights, path / WEIGHTS, metadata={CONFIG_PIN: file_sha256(path / CONFIG)} if pinned else None)
    write_manifest(path, base_sha256=file_sha256(model / "model.safetensors"), round_number=round_number)
    return file_sha256(path / WEIGHTS)


def build_tiny_folder(folder: Path, *, pinned: bool = False) -> Path:
    """Write a tiny model to ``tiny`` and two adapters of it to ``adapters/{r1,r2}``; returns ``folder``."""
    model = build_tiny_model(folder / "tiny")
    for seed in (1, 2):
        build_tiny_adapter(folder / "adapters" / f"r{seed}", model, seed=seed, pinned=pinned)
    return folder


def write_manifest(path: Path, *, base_sha256: str, round_number: int = 1) -> None:
    """Write the manifest that fits the weights now lying in ``path``."""
    manifest = AdapterManifest(
        sha256=file_sha256(path / WEIGHTS),
        base_model_id="tiny",
        base_model_sha256=base_sha256,
        arm="none",
        round_number=round_number,
        config={},
    )
    (path / MANIFEST).write_text(manifest.model_dump_json())
