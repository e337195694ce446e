"""What the student learns from: the caches, the loss, and how their text reaches another tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kd.cache_builder.weighted_caches import WeightedCache, parse_caches, require_weights
from kd.common.byte_sizes import byte_count
from kd.common.errors import DataError
from kd.common.setting_values import unescaped
from kd.common.settings import check, setting
from kd.data.conversations.chat_settings import variables_from

LossName = Literal["kl", "reverse-kl", "jsd", "text-kl", "uld", "hybrid", "alm", "ce"]
TailName = Literal["auto", "ghost", "sampled", "renorm"]
# tests compare both with their registries


@dataclass(frozen=True)
class CacheSettings:
    """Which cache is read, and how much of it."""

    cache: tuple[WeightedCache, ...] = setting(metavar="CACHE[=WEIGHT]", multiple=True, parse=parse_caches)
    """Path, URL (hf://datasets/…, s3://…, https://…), or the beginning of a fingerprint. Several caches are mixed by their
    weights: --cache A=0.7 --cache B=0.3."""
    cache_bytes: int | None = setting(
        None, metavar="SIZE", parse=byte_count, minimum=1, shown="KD_CACHE_BYTES, or 20GB"
    )
    """Most bytes of a URL's shards that are kept on this disk, e.g. 20GB."""
    top_k: int | None = None
    """Number of tokens per row to use. By default all that are stored."""

    def __post_init__(self) -> None:
        check(self)
        require_weights(self.cache)


@dataclass(frozen=True)
class LossSettings:
    """What the student minimises."""

    loss: LossName = "kl"
    """Loss to minimise. With the teacher's tokenizer: kl, reverse-kl, jsd. With any tokenizer: text-kl, alm, hybrid, uld. ce
    fine-tunes on the same text, as the baseline."""
    tail: TailName = "auto"
    """How kl treats the probability outside the top-k: ghost (one extra outcome), sampled (draws), or renorm. auto is ghost, or
    sampled where the cache holds draws alone, or draws from the tail and the temperature is 1."""
    alpha: float | None = setting(None, shown="1; 0.5 for text-kl, uld and hybrid")
    """Weight of the distillation loss."""
    ce_weight: float | None = setting(None, shown="1 - alpha; 1 beside alm without --alpha")
    """Weight of the cross-entropy."""
    temperature: float = setting(1.0, above=0)
    """Temperature of both softmaxes; it must be on the cache's grid. Divergences are multiplied by its square."""
    beta: float = 0.5
    """Weight of KL(teacher || mixture) in jsd and hybrid, between 0 and 1."""
    merge: Literal["observed", "exact", "first", "single"] = "observed"
    """What uld compares of a group of several tokens: observed (the distribution at the first token, times the probability of the
    tokens after it), exact (the one at the last token, times the probability of the tokens before it), first (the one at the
    first token alone), or single (nothing: only groups of one token on both sides are compared)."""
    ranking: Literal["exact", "fast"] = "fast"
    """How uld sorts the student's probabilities: fast (in bins), or exact (full sort)."""

    def __post_init__(self) -> None:
        check(self)
        if not 0 < self.beta < 1:  # at either end the mixture is one of the two sides, and the divergence is 0
            raise DataError(
                "beta is out of bounds",
                found=f"--beta {self.beta:g}",
                expected="between 0 and 1",
                try_="--loss kl or reverse-kl for the limits",
            )


@dataclass(frozen=True)
class TextSettings:
    """How the cached text reaches a student whose tokens are not the teacher's."""

    alignment: Literal["bytes", "positional"] = "bytes"
    """How uld, hybrid and alm pair tokens: bytes (the same text), or positional (token by token)."""
    align_eos: bool = True
    """Compare the ends of text too, where both sides have an EOS token."""
    prompt_loss: bool = False
    """Add the prompt's tokens to the cross-entropy."""
    separator: str | None = setting(None, typed=unescaped, shown="as in the cache")
    """Text between prompt and target for the student."""
    seq_len: int | None = setting(None, minimum=1, shown="the student's positions")
    """Most tokens of an example in the student's own tokens (for an encoder: of the prompt), and of a packed sequence."""
    chat_template: str | None = setting(None, metavar="FILE")
    """File with the student's chat template in Jinja, or plain, for conversations and losses over its own tokens. By default its
    tokenizer's own template; a student with the teacher's tokenizer reads the cached tokens."""
    template_kwargs: Mapping[str, Any] | None = setting(None, metavar="KEY=VALUE,…", parse=variables_from)
    """Further variables of the student's chat template, e.g. enable_thinking=false."""
    target_len: int | None = setting(None, minimum=1)
    """Most tokens of a target in the student's own tokens, EOS included. By default what --seq-len leaves; for an
    encoder-decoder its positions."""

    def __post_init__(self) -> None:
        check(self)
