"""How an encoder-decoder's two texts are laid out: the special tokens around the source, and around the target.

T5 and its like, Pegasus and Marian end both texts with EOS and add nothing else. BART puts `<s>` before both. mBART-50,
M2M-100 and NLLB put a language code before both. mBART puts one after both, and its decoder starts from the target's. The
tokens come from the tokenizer's own template, as `tokenizer(text)` and `tokenizer(text_target=text)` use it. The decoder's
start comes from the configuration. What the template puts before a target is forced when a model writes (transformers'
`forced_bos_token_id`): the decoder reads it after its start token, and nobody predicts it.

A family whose layout nobody has checked is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kd.common.errors import DataError
from kd.models.tokenizer import Tokenizer

ENDED_BY_EOS = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
"""Model types whose texts end with EOS and have nothing else, whatever the tokenizer's template."""
BY_TEMPLATE = (
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "led",
    "m2m_100",
    "marian",
    "mbart",
    "mvp",
    "nllb-moe",
    "pegasus",
    "pegasus_x",
    "plbart",
)
"""Model types whose texts follow the tokenizer's template."""
STARTED_BY_LANGUAGE = ("mbart", "plbart")
"""Model types whose decoder starts from the code that the template puts after the target's EOS."""
PROBE = "a"
"""A text that a template is tried on."""


@dataclass(frozen=True)
class EncoderLayout:
    """Ids of the special tokens around an encoder-decoder's two texts."""

    source_before: tuple[int, ...]
    source_after: tuple[int, ...]
    target_before: tuple[int, ...]
    """Read by the decoder after its start token, and not predicted."""
    target_after: tuple[int, ...]
    """Predicted after a target that is whole; the last one is EOS."""

    def __post_init__(self) -> None:
        for name in ("source_before", "source_after", "target_before", "target_after"):  # JSON has lists
            object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))


def encoder_layout(config: Any, tokenizer: Tokenizer) -> EncoderLayout | None:
    """The layout for a model's configuration; None where both texts end with EOS and have nothing else.

    None for a causal model too. Raises DataError for a family whose layout is not known, for languages that are not named,
    and for a template that does not fit the model.
    """
    if not getattr(config, "is_encoder_decoder", False) or config.model_type in ENDED_BY_EOS:
        return None
    if config.model_type not in BY_TEMPLATE:
        raise DataError(
            "how this family of encoder-decoders lays out its two texts is not known",
            where=config.model_type,
            expected=", ".join((*ENDED_BY_EOS, *BY_TEMPLATE)),
        )
    _require_languages(tokenizer, config.model_type)
    source, target = _around(tokenizer, "text"), _around(tokenizer, "text_target")
    eos = tokenizer.eos_token_id
    if eos is None or not (source[0] or source[1] or target[0] or target[1]):
        return None  # a tokenizer without a template
    end, language = _split_at_end(target[1], eos)
    if language:
        _require_start(config, tokenizer, language)
    layout = EncoderLayout(*source, target[0], end)
    return None if layout == EncoderLayout((), (eos,), (), (eos,)) else layout


def set_languages(tokenizer: Tokenizer, source: str | None, target: str | None) -> None:
    """Name the languages of the source and the target to a tokenizer that writes them. Raises DataError."""
    for option, attribute, language in (("--source-lang", "src_lang", source), ("--target-lang", "tgt_lang", target)):
        if language is None:
            continue
        if not _writes_languages(tokenizer):
            raise DataError(
                "the tokenizer writes no language codes",
                where=tokenizer.name_or_path,
                found=f"{option} {language}",
                try_=f"leave {option} out",
            )
        if tokenizer.convert_tokens_to_ids(language) in (None, tokenizer.unk_token_id):
            codes = [t for t in tokenizer.get_added_vocab() if t not in _named_tokens(tokenizer)]
            raise DataError(
                "the tokenizer has no such language code",
                where=tokenizer.name_or_path,
                found=f"{option} {language}",
                expected="one of " + ", ".join(sorted(codes)[:20]) + (", …" if len(codes) > 20 else ""),
            )
        setattr(tokenizer, attribute, language)
        tokenizer.init_kwargs[attribute] = language  # which `save_pretrained` writes


def start_language(tokenizer: Tokenizer, model_type: str) -> int | None:
    """Id of the target's language, where the decoder starts from it: mBART, but not mBART-50. None elsewhere."""
    if model_type not in STARTED_BY_LANGUAGE or not getattr(tokenizer, "tgt_lang", None):
        return None
    _, after = _split_at_end(_around(tokenizer, "text_target")[1], tokenizer.eos_token_id)
    return after[0] if len(after) == 1 else None


def _writes_languages(tokenizer: Tokenizer) -> bool:
    return hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")


def _named_tokens(tokenizer: Tokenizer) -> set[str]:
    """Special tokens that have a role: BOS, EOS, padding and so on."""
    return {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}


def _require_languages(tokenizer: Tokenizer, model_type: str) -> None:
    """Raise DataError where the tokenizer writes a language that nobody named: its default is English for every text."""
    if not _writes_languages(tokenizer):
        if model_type in ("m2m_100", "nllb-moe"):
            raise DataError(
                "the model needs language codes, and its tokenizer writes none",
                where=model_type,
                found=type(tokenizer).__name__,
                expected="the family's own tokenizer",
            )
        return
    named = {"--source-lang": tokenizer.init_kwargs.get("src_lang"), "--target-lang": tokenizer.tgt_lang}
    missing = [option for option, language in named.items() if not language]
    if missing:
        raise DataError(
            "the tokenizer writes the language of each text, and it was not named",
            where=tokenizer.name_or_path,
            found="no " + ", no ".join(missing),
            expected="codes such as " + ", ".join([t for t in tokenizer.get_added_vocab() if "_" in t][:3]),
            try_=" ".join(f"{option} CODE" for option in missing)
            + "; of a tokenizer in memory: from_pretrained(…, src_lang=…, tgt_lang=…)",
        )


def _around(tokenizer: Tokenizer, side: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the tokenizer's template puts before and after a text; `side` is `text` or `text_target`."""
    whole = list(tokenizer(**{side: PROBE})["input_ids"])
    inner = list(tokenizer(**{side: PROBE}, add_special_tokens=False)["input_ids"])
    starts = [i for i in range(len(whole)) if whole[i : i + len(inner)] == inner]
    if not inner or not starts:
        raise DataError(
            "the tokenizer's template cannot be told from its text",
            where=tokenizer.name_or_path,
            found=f"{whole} with special tokens and {inner} without",
        )
    start = starts[0]
    return tuple(whole[:start]), tuple(whole[start + len(inner) :])


def _split_at_end(after: tuple[int, ...], eos: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a template puts after a target, up to and with EOS, and the rest; EOS is added where it has none."""
    end = after.index(eos) + 1 if eos in after else len(after)
    return (after[:end] if eos in after else (*after, eos)), after[end:]


def _require_start(config: Any, tokenizer: Tokenizer, language: tuple[int, ...]) -> None:
    """Raise DataError unless the decoder starts from the tokens that the template puts after the target's EOS."""
    start = getattr(config, "decoder_start_token_id", None)
    if config.model_type in STARTED_BY_LANGUAGE and language == (start,):
        return
    names = [tokenizer.convert_ids_to_tokens(i) for i in language]
    raise DataError(
        "the decoder starts from another token than the target's template ends with",
        where=config.model_type,
        found="no start" if start is None else f"start {tokenizer.convert_ids_to_tokens(start)!r}",
        expected=", ".join(map(str, names)),
        try_="--target-lang with the language that the model writes",
    )
