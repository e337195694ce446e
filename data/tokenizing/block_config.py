"""The settings by which text becomes token rows: they are part of a cache's identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.instruction_tasks.glue import CLASSES
from kd.data.tokenizing.text_tokens import CONTROL_TOKENS
from kd.models.families.encoder_layout import EncoderLayout
from kd.models.tokenizer import Tokenizer

OVERLONG = ("error", "drop", "truncate")
"""Policies for pairs that are too long."""


@dataclass(frozen=True)
class BlockConfig:
    """How text becomes rows. These settings are part of a cache's identity."""

    seq_len: int = 512
    """Tokens per block, context included."""
    stride: int | None = None
    """New tokens scored per block, from 1 to seq_len - 1; None is seq_len - 1."""
    bos: bool = True
    """Begin each document or prompt with the BOS token, if the tokenizer has one."""
    eos: bool = False
    """Score an EOS token after each document. Targets of pairs always end with EOS, if the tokenizer has one."""
    separator: str = "\n"
    """Text between prompt and target of a pair, tokenised with both. Not used with an encoder."""
    encoder: bool = False
    """Whether an encoder reads the context. Then only the context is limited by `seq_len`; it ends with EOS and has no BOS."""
    target_len: int | None = None
    """Maximum number of target tokens of a pair, EOS included; None is what `seq_len` leaves."""
    overlong: str = "error"
    """Policy for pairs that are too long: error, drop or truncate."""
    control_tokens: str = "auto"
    """How a control token that is spelled in a text is read: auto, control or text; see `kd.data.tokenizing.text_tokens`."""
    layout: EncoderLayout | None = None
    """Special tokens around an encoder's and a decoder's text; None where EOS ends both and nothing else is added."""

    def __post_init__(self) -> None:
        if self.control_tokens not in CONTROL_TOKENS:
            raise unknown_name("way to read control tokens", self.control_tokens, CONTROL_TOKENS)
        if self.overlong not in OVERLONG:
            raise unknown_name("policy for pairs that are too long", self.overlong, OVERLONG)
        if self.target_len is not None and self.target_len < 1:
            raise DataError("the target length is too small", found=self.target_len, expected="at least 1 token")
        if self.seq_len < 2:
            raise DataError(
                "the sequence length is too small",
                found=self.seq_len,
                expected="at least 2 tokens",
                try_="--seq-len 512",
            )
        if self.stride is not None and not 1 <= self.stride < self.seq_len:
            raise DataError(
                "the stride does not fit the sequence length",
                found=self.stride,
                expected=f"1..{self.seq_len - 1} tokens",
                try_="--stride",
            )

    @property
    def forced(self) -> tuple[int, ...]:
        """Ids that a decoder begins every target with, after its start token."""
        return () if self.layout is None else self.layout.target_before

    @classmethod
    def from_identity(cls, entries: Mapping[str, Any]) -> BlockConfig:
        """The settings that a cache's identity holds, see `identity`."""
        layout = entries.get("layout")
        return cls(**{**entries, "layout": None if layout is None else EncoderLayout(**layout)})

    def identity(self) -> dict[str, Any]:
        """The settings as a cache's identity holds them. How control tokens are read stands with the tokenizer.

        A layout is left out where there is none, as caches had it before.
        """
        entries = asdict(self)
        del entries["control_tokens"]
        if self.layout is None:
            del entries["layout"]
        else:  # as JSON has it
            entries["layout"] = {name: list(ids) for name, ids in entries["layout"].items()}
        return entries

    def normalised(self, kind: str, tokenizer: Tokenizer) -> BlockConfig:
        """Settings that give the same rows, where those that `tokenize_corpus` ignores for this kind of corpus are fixed.

        Pairs have no stride and always end with EOS; documents have no separator; BOS and EOS are off where the tokenizer
        has none. For texts to classify and conversations only the length matters, because tokenizer and template add the
        special tokens.
        """
        if kind in (CLASSES, CONVERSATIONS):
            only = BlockConfig(self.seq_len, self.seq_len - 1, bos=False, overlong=self.overlong)
            return only if kind == CONVERSATIONS else replace(only, control_tokens=self.control_tokens)
        pairs = kind != "documents"
        return replace(
            self,
            stride=self.seq_len - 1 if pairs or self.stride is None else self.stride,
            bos=self.bos and tokenizer.bos_token_id is not None and not self.encoder,
            eos=(self.eos or pairs) and tokenizer.eos_token_id is not None,
            separator=self.separator if pairs and not self.encoder else BlockConfig.separator,
            target_len=self.target_len if pairs else None,
            overlong=self.overlong if pairs else "error",
        )
