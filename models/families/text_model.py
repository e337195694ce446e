"""The text model of a checkpoint that holds more: Gemma 3, Mistral 3, Qwen 3.5, Llama 4, LLaVA and the like.

Such a checkpoint has a configuration of several parts, and a text model beside one for images. Where transformers has a class
for the text model alone, that class is loaded, and the weights of the image side are never read. Where it has none (Qwen-VL,
GLM-V), the whole model is loaded and only reads text. In both cases everything else sees the text model's configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from kd.common.errors import TeacherError

TEXT_KEYS = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^model\.(?:language_model|text_model)\.model\.": "model.",
    r"^(?:language_model|text_model)\.model\.": "model.",
    r"^model\.(?:language_model|text_model)\.": "model.",
}
"""Names of the text model's weights in a checkpoint -> their names in the text model's own class."""


def text_config(config: Any) -> Any:
    """The configuration of a checkpoint's text model; `config` itself where there is nothing else in the checkpoint.

    What the checkpoint says of the whole counts for the text model: whether the output layer is tied, how weights are stored,
    and how they are quantised.
    """
    text = config.get_text_config()
    if text is config or getattr(config, "is_encoder_decoder", False) or _is_classifier(config):
        return config
    text = copy.deepcopy(text)
    for name in ("tie_word_embeddings", "quantization_config"):
        if hasattr(config, name):
            setattr(text, name, getattr(config, name))
    text.dtype = config.dtype if getattr(config, "dtype", None) is not None else text.dtype
    model_class = text_class(text)
    text.architectures = list(config.architectures or ()) if model_class is None else [model_class.__name__]
    return text


def text_class(text: Any) -> Any | None:
    """transformers' class of causal language models for a text model's configuration; None where there is none."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(text), None)


def loader_of(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class whose `from_pretrained` loads the text model of a checkpoint with this configuration, and its arguments."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM, {}
    text = text_config(config)
    if text is config:
        return transformers.AutoModelForCausalLM, {}
    if text_class(text) is None:
        return transformers.AutoModelForImageTextToText, {}
    return transformers.AutoModelForCausalLM, {"config": text, "key_mapping": TEXT_KEYS}


def refuse_missing_weights(name: str, model: Any, loading_info: Mapping[str, Any]) -> None:
    """Raise TeacherError where a checkpoint lacks weights: transformers would only warn, and fill them with random numbers.

    loading_info  what `from_pretrained(output_loading_info=True)` says beside the model
    """
    parameters = {parameter for parameter, _ in model.named_parameters()}
    missing = sorted(parameters & set(loading_info["missing_keys"]))
    if missing:
        raise TeacherError(
            "the checkpoint lacks weights of the model",
            where=name,
            found=f"{len(missing)} missing, such as {missing[0]}",
            expected="every weight of a language model, its output layer included",
        )


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
