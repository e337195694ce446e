"""Load the first layers of a text encoder (BERT, RoBERTa, T5's encoder, …), whose states BERTScore compares."""

from __future__ import annotations

from typing import Any

from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.common.strangers.plain_files import refuse_special_files
from kd.models.families.positions import max_positions


def load_encoder(name: str, layers: int, device: str) -> tuple[Any, Any]:
    """The first `layers` layers of an encoder in float32, and its tokenizer. Raises DataError.

    name   folder or hub id
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    try:
        model, tokenizer, config = _loaded(name, layers)
    except DataError:
        raise
    except Exception as error:  # OSError, ValueError, HTTP errors: one message for all
        raise DataError(
            "cannot load the encoder",
            where=name,
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="a folder written by save_pretrained, or a hub id that can be reached",
            try_="--bertscore-model FOLDER, or leave it out",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if tokenizer.pad_token_id is None:
        raise DataError("the encoder's tokenizer has no padding token", where=name, try_="another --bertscore-model")
    positions = max_positions(config)
    if positions is not None:  # RoBERTa's first position is that of its padding token, plus one
        offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - offset)
    return model.to(device).eval(), tokenizer


def _loaded(name: str, layers: int) -> tuple[Any, Any, Any]:
    """Model, tokenizer and configuration, as transformers loads them."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils import logging

    path = str(as_path(name))
    refuse_special_files(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not 1 <= layers <= config.num_hidden_layers:
        raise DataError(
            "the encoder has no such layer",
            where=name,
            found=f"--bertscore-layer {layers}",
            expected=f"1..{config.num_hidden_layers}",
        )
    config.num_hidden_layers = layers
    auto_class = AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel
    logging.set_verbosity_error()  # it would warn about the layers beyond, which are left out on purpose
    model = auto_class.from_pretrained(path, config=config, dtype=torch.float32, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(path, trust_remote_code=False), config
