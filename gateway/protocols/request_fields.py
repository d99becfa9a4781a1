"""Fields of a request beside those that its protocol reads: refused, left out, or passed on with their text checked.

Servers add fields of their own, and a gateway that knew them all would be out of date with each release of theirs. So
an unknown field goes upstream and every string in it is checked. What is refused by name here is what a check of
strings cannot judge. Why: docs/adr/0011-unknown-fields-are-checked.md.
"""

from gateway.asked import MAX_CHOICES, Turn, given
from services.contracts.chat import Json
from services.contracts.errors import RequestError

# What OpenAI's clients may send along for OpenAI's own bookkeeping; it says nothing to the model and is left out.
IGNORED_FIELDS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# No check can read these: token ids, embeddings and media; templates, which compute text; code that runs in the server;
# what another request or server has computed; and token ids in place of the text of an answer's tokens.
UNCHECKED_FIELDS = (
    "audio_data",
    "chat_template",
    "custom_logit_processor",
    "image_data",
    "images",
    "input_embeds",
    "input_ids",
    "kv_transfer_params",
    "logits_processors",
    "mm_processor_kwargs",
    "multi_modal_data",
    "prompt_embeds",
    "prompt_token_ids",
    "return_tokens_as_token_ids",
    "session_params",
    "video_data",
)
# By these SGLang, LoRAX, llama.cpp, TensorRT-LLM, MLX and OpenRouter take another model than the one that was allowed.
CHOOSING_FIELDS = (
    "adapter_id",
    "adapter_parameters",
    "adapter_source",
    "adapters",
    "draft_model",
    "lora",
    "lora_id",
    "lora_path",
    "lora_request",
    "models",
)
# Texts that the model does not read.
_NOT_READ = ("model", "stop", "stream_options")


def other_fields(fields: Json, known: tuple[str, ...], *, place: str = "") -> tuple[Json, Turn]:
    """The fields beside the ``known`` ones: as they go upstream, and all text in them, which is checked.

    Args:
        fields: of the request.
        known: names of those that the caller reads itself.
        place: where in the request they stand, for messages: ``parameters.``.

    Raises:
        RequestError: a field brings input that nothing can check, or chooses another model.
    """
    _refuse(fields, place)
    variables = fields.get("chat_template_kwargs")
    if isinstance(variables, dict):  # servers have let these stand in for their own arguments
        _refuse(variables, f"{place}chat_template_kwargs.")
    left_out = (*known, *IGNORED_FIELDS, *UNCHECKED_FIELDS, *CHOOSING_FIELDS)
    options = {name: value for name, value in fields.items() if name not in left_out}
    wanted = options.pop("stream_options", None)
    if isinstance(wanted, dict):
        options["stream_options"] = {"include_usage": wanted.get("include_usage") is True}
    texts = {name: value for name, value in options.items() if isinstance(value, str | dict | list)}
    return options, given(*(value for name, value in texts.items() if name not in _NOT_READ))


def choices_asked(fields: Json) -> int:
    """How many answers are asked for; raises RequestError for what is no such number."""
    n = fields.get("n", 1)
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_CHOICES:
        raise RequestError(f"n: has to be a number from 1 to {MAX_CHOICES}", param="n")
    return n


def _refuse(fields: Json, place: str) -> None:
    for names, reason in (
        (UNCHECKED_FIELDS, "since nothing can check it; leave it out"),
        (CHOOSING_FIELDS, "since it chooses another model; choose by 'model' (TGI: 'parameters.adapter_id')"),
    ):
        for name in names:
            if fields.get(name):
                raise RequestError(f"{place}{name}: not supported, {reason}", param=place + name)
