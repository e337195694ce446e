"""Settings of `kd cache import`. This module imports nothing heavy: the command line reads it to print its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd.cache_builder.store.profiles import CODEC_NAMES, ID_CODECS
from kd.common.settings import check, setting

FORMAT_NAMES = ("npz", "jsonl", "parquet", "distillkit")
"""Formats that can be imported: the keys of `source_formats.FORMATS`."""


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What an import is told that its source cannot say."""

    out: Path = setting(folder=True)
    """Folder of the cache."""
    tokenizer: str
    """Folder or hub id of the teacher's tokenizer. It says what the token ids of the source stand for."""
    revision: str | None = None
    """Branch, tag or commit of a tokenizer on the hub. By default its main branch."""
    teacher: str | None = setting(None, metavar="NAME", shown="unknown")
    """What the teacher is called. It is part of the cache's identity."""
    teacher_id: str | None = setting(None, metavar="TEXT")
    """Your own name of the teacher's weights, such as a commit. It is part of the cache's identity, because the weights
    themselves cannot be digested."""
    tail: Literal["rest", "unknown"] = "rest"
    """What lies beyond the kept tokens. rest: what their probabilities leave of 1, as with raw log-probabilities; unknown:
    the source holds values without their normaliser (renormalised probabilities, or logits), so only --tail renorm of kd
    train can use the cache."""
    profile: Literal["kl", "compact", "adaptive"] = "kl"
    """What is kept of each row: kl (top-k), compact (top-k, coarser), or adaptive (the tokens above a probability)."""
    top_k: int | None = setting(None, minimum=1, shown="those of the shortest row; of the longest, for adaptive")
    """Tokens kept per row, the most probable first. The probability of the others goes into the tail."""
    min_probability: float | None = setting(None, shown="the profile's own number")
    """Least probability of a kept token (profile adaptive)."""
    min_k: int | None = setting(None, shown="1; 2 with --certain-below")
    """Tokens that every row keeps, however improbable (profile adaptive). Certain rows are an exception."""
    certain_below: float | None = setting(None, metavar="NATS", shown="no row is certain")
    """Entropy in nats below which a row is certain: it keeps its most probable token alone, and the tail (profile adaptive). The
    source tells only how large the entropy can be at most, which decides."""
    logprob_codec: str | None = setting(None, choices=CODEC_NAMES, shown="the profile's own codec")
    """Encoding of the log-probabilities, as for kd cache build."""
    id_codec: str | None = setting(None, choices=ID_CODECS, shown="frequency")
    """Encoding of the kept tokens' ids, as for kd cache build."""
    shard_rows: int | None = setting(None, minimum=1, shown="32768")
    """Rows per shard. A shard is the unit of writing and of resuming."""
    check_source: bool = True
    """Refuse a source whose rows seem to be shifted by a token, whose ids seem to be those of another tokenizer, or whose
    kept probabilities sum to 1 in every row."""

    def __post_init__(self) -> None:
        check(self)
