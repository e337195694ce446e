"""Checks that a cache belongs to a student; each that fails stops the run before its first step.

"The same tokenizer" means that every id the data can hold stands for the same piece: the cache carries the bytes
of every teacher id, and the student's ids must stand for the same ones. More ids on the student's side (a pad
token, padded logits) do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.readers.reading import Reader
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.records.part import part_of
from kd.cache_builder.store.records.teacher_record import WHY_ONE
from kd.cache_builder.store.targets import TargetConfig
from kd.common.errors import CacheMismatchError, DataError, unknown_name
from kd.data.conversations.conversation import CONVERSATIONS
from kd.models.families.encoder_layout import EncoderLayout
from kd.models.families.positions import max_positions
from kd.models.tokenizer import Tokenizer, token_bytes
from kd.student_trainer.configuration.learning_settings import LossSettings
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_settings import GroupSettings


def refuse_other_tokenizer(reader: Reader, tokenizer: Tokenizer, *, purpose: str, advice: str) -> None:
    """Raise CacheMismatchError unless every id of the cache stands for the same bytes in the model's tokenizer.

    `purpose` says what compares token by token, `advice` what to try.
    """
    refuse_classes(reader, purpose)
    teacher, student = reader.vocabulary(), token_bytes(tokenizer)
    differing = [i for i, piece in enumerate(teacher) if i >= len(student) or student[i] != piece]
    if differing:
        first = differing[0]
        other = repr(student[first].decode("utf-8", "replace")) if first < len(student) else "no such id"
        raise CacheMismatchError(
            f"the model's tokenizer is not the teacher's, and {purpose} compares token by token",
            cache=reader.root,
            differs=f"{len(differing)} of {len(teacher)} ids",
            first=f"id {first}: teacher {teacher[first].decode('utf-8', 'replace')!r}, model {other}",
            teacher=reader.manifest.provenance.get("teacher"),
            try_=advice,
        )


def refuse_classes(reader: Reader, purpose: str) -> None:
    """Raise CacheMismatchError for a cache of distributions over classes, where distributions over tokens are needed."""
    if reader.manifest.labels:
        raise CacheMismatchError(
            f"{purpose} wants distributions over tokens, and this cache's are over classes",
            cache=reader.root,
            found=", ".join(reader.manifest.labels),
            try_="kd classify train --cache",
        )


def refuse_other_layout(reader: Reader, purpose: str, *, encoder: bool) -> None:
    """Raise CacheMismatchError where rows are compared and only one of teacher and model has an encoder.

    `purpose` says what compares row by row; `encoder` whether the model has one.
    """
    if reader.manifest.blocks.encoder != encoder:
        teacher, model = ("with", "has none") if not encoder else ("without", "has one")
        raise CacheMismatchError(
            f"{purpose} compares row by row, and this teacher reads its prompt {teacher} an encoder",
            cache=reader.root,
            teacher=reader.manifest.provenance.get("teacher"),
            found=f"a model that {model}",
            try_="a model laid out as the teacher; in training --loss "
            "text-kl (alm from a cache without ids), or --loss ce for the baseline",
        )


def refuse_other_template(reader: Reader, layout: EncoderLayout | None, tokenizer: Tokenizer) -> None:
    """Raise CacheMismatchError where the model would read other special tokens around its texts than the cache has."""
    cached = reader.manifest.blocks.layout
    if cached != layout:
        names = [_template(tokenizer, each) for each in (layout, cached)]
        raise CacheMismatchError(
            "the model puts other special tokens around its texts than the cache's teacher",
            cache=reader.root,
            found=names[0],
            expected=names[1],
            try_="the --source-lang and --target-lang of the cache; or --loss text-kl (alm from a cache without ids)",
        )


def _template(tokenizer: Tokenizer, layout: EncoderLayout | None) -> str:
    """A layout in words: `fr_XX source </s>, de_DE target </s>`."""
    if layout is None:
        return "source EOS, target EOS"
    sides = {
        "source": (layout.source_before, layout.source_after),
        "target": (layout.target_before, layout.target_after),
    }
    tokens = tokenizer.convert_ids_to_tokens
    return ", ".join(" ".join([*tokens(list(a)), side, *tokens(list(b))]) for side, (a, b) in sides.items())


def refuse_without_prompts(reader: Reader) -> None:
    """Raise DataError when a student's encoder would have nothing to read."""
    kind = reader.manifest.identity["corpus"]["kind"]
    if kind in ("documents", CONVERSATIONS):
        raise DataError(
            "an encoder-decoder student needs prompts for its encoder",
            cache=reader.root,
            found=f"a cache of {kind}",
            expected="a cache of prompts and targets",
            try_="a causal student, or a cache of --data flan:four, mini, or files with --columns prompt=…,target=…",
        )


def same_tokenizer(reader: Reader, tokenizer: Tokenizer) -> bool:
    """Whether every id of the cache stands for the same bytes in the student's tokenizer."""
    return token_bytes(tokenizer)[: reader.manifest.vocabulary_size] == reader.vocabulary()


def refuse_narrow_student(reader: Reader, config: Any, longest: int, written: int = 0) -> None:
    """Raise DataError when the student has fewer logits than the cache has ids, or too few positions.

    longest   most tokens that the student reads as one sequence; for an encoder-decoder, that its encoder reads
    written   most tokens that its decoder reads
    """
    if int(config.vocab_size) < reader.manifest.vocabulary_size:
        raise CacheMismatchError(
            "the student has fewer logits than the cache has ids",
            cache=reader.root,
            found=config.vocab_size,
            expected=f"at least {reader.manifest.vocabulary_size}",
        )
    sides = (
        ("--seq-len", longest, max_positions(config)),
        ("--target-len", written, max_positions(config, decoder=True)),
    )
    for option, tokens, limit in sides:
        if limit is not None and tokens > limit:
            raise DataError(
                "the cache's examples are longer than the student's window",
                cache=reader.root,
                found=f"{tokens} tokens",
                expected=f"at most {limit}",
                try_=f"a cache built with {option} {limit}, or another student",
            )


def resolve_objective(
    config: TargetConfig, settings: LossSettings, *, edges: tuple[int, ...] = (), logprobs_only: bool = False
) -> Objective:
    """Fill in `auto` and defaults, and check that a cache of this configuration holds what the loss needs.

    edges           ranks between the cache's bands, where it has any
    logprobs_only   whether the teacher gave log-probabilities at temperature 1 and no logits; the tail is then one band

    Tail: ghost where top-k ids are stored, and sampled where only draws are, or where kl at temperature 1 finds draws from the
    tail. Weights: those of the loss. Raises DataError.
    """
    if settings.merge != "observed" and settings.loss != "uld":
        raise DataError(
            "uld alone merges groups in several ways: other losses need to know which text each value belongs to",
            found=f"--merge {settings.merge} --loss {settings.loss}",
            try_="--loss uld, or leave --merge out",
        )
    if settings.loss == "ce":
        refuse_teacher_settings(settings)
        return Objective("ce", "none", 0.0, 1.0)
    alpha, ce_weight = _weights(settings)
    tail = _tail(config, settings.loss, settings.tail, settings.temperature)
    if logprobs_only and settings.temperature != 1.0:
        raise DataError(
            "this cache can only be used at temperature 1",
            found=f"--temperature {settings.temperature:g}",
            expected="1",
            why=WHY_ONE,
            try_="--temperature 1; or a cache of the same text whose teacher is loaded by kd, which stores several",
        )
    _check_holdings(config, settings.loss, settings.temperature, logprobs_only)
    if settings.temperature not in config.temperatures:
        raise DataError(
            "this cache does not hold that temperature",
            found=f"--temperature {settings.temperature:g}",
            expected=f"one of {', '.join(f'{t:g}' for t in config.temperatures)}",
            try_="a temperature of the grid, or build with --temperatures",
        )
    if tail == "sampled" and settings.temperature != 1.0:
        raise DataError(
            "sampled targets can only be used at temperature 1",
            found=f"--temperature {settings.temperature:g}",
            expected="1",
            try_="--tail ghost with a cache of profile kl, compact or adaptive",
        )
    groups = GroupSettings(edges=edges, ranking=settings.ranking, beta=settings.beta, merge=settings.merge)
    return Objective(settings.loss, tail, alpha, settings.temperature, ce_weight, groups)


def refuse_unknown_parts(manifest: CacheManifest, objective: Objective) -> None:
    """Raise DataError where a loss needs what the source of an imported cache did not say."""
    if objective.loss == "ce":
        return
    if manifest.tail_unknown and objective.tail != "renorm":
        raise DataError(
            f"this cache cannot serve --loss {objective.loss}" + _tail_mode(objective),
            found="kept probabilities that sum to 1: what lies beyond them is unknown",
            expected="--loss kl --tail renorm, which compares the kept tokens among themselves",
            try_="--tail renorm; or a cache whose teacher gave raw log-probabilities",
        )
    if manifest.gold_in_top_k and LOSSES[objective.loss].any_tokenizer:
        raise DataError(
            f"this cache cannot serve --loss {objective.loss}",
            found="a source without the log-probability of tokens of the text that are not among the kept ones",
            expected="the log-probability of every token of the text, which chains of tokens are scored with",
            try_="--loss kl, reverse-kl or jsd; or an import with gold_logprobs",
        )


def _tail_mode(objective: Objective) -> str:
    return "" if objective.tail == "none" else f" --tail {objective.tail}"


def refuse_teacher_settings(settings: LossSettings) -> None:
    """Raise DataError for settings of a distillation loss beside plain cross-entropy."""
    given = {
        "--alpha": settings.alpha not in (None, 0.0),
        "--temperature": settings.temperature != 1.0,
        "--tail": settings.tail != "auto",
        "--ce-weight": settings.ce_weight not in (None, 1.0),
    }
    if any(given.values()):
        raise DataError(
            "cross-entropy has no teacher to weigh or soften",
            found="--loss ce with " + ", ".join(option for option, used in given.items() if used),
            try_="--loss kl, or leave them out",
        )


def _weights(settings: LossSettings) -> tuple[float, float | None]:
    """Weights of the distillation loss and of the cross-entropy (None = what alpha leaves of 1), the defaults filled in.

    Raises DataError for weights that cannot be used.
    """
    for option, weight in (("--alpha", settings.alpha), ("--ce-weight", settings.ce_weight)):
        if weight is not None and not 0.0 <= weight < math.inf:
            raise DataError(
                "a weight of the loss is not usable", found=f"{option} {weight:g}", expected="a number from 0"
            )
    alpha, ce_weight = settings.alpha, settings.ce_weight
    if alpha is None:
        alpha, beside = LOSSES[settings.loss].weights
        ce_weight = beside if ce_weight is None and beside != 1 - alpha else ce_weight
    if alpha > 1.0 and ce_weight is None:
        raise DataError(
            "alpha above 1 leaves no weight for the cross-entropy",
            found=f"--alpha {alpha:g}",
            expected="0..1, or --ce-weight beside it",
            try_="--ce-weight 1",
        )
    return alpha, ce_weight


def _other_losses(held: Mapping[str, bool]) -> str:
    """Losses for any tokenizer that a cache with these holdings serves, as advice; empty where there is none."""
    served = [name for name, loss in LOSSES.items() if loss.any_tokenizer and all(held[need] for need in loss.needs)]
    return f"--loss {' or '.join(served)}, for any tokenizer, from this cache; or " if served else ""


def needed_arrays(objective: Objective, manifest: CacheManifest) -> tuple[str, ...]:
    """Stored arrays that training with this objective reads, in the manifest's order."""
    loss, config = LOSSES[objective.loss], manifest.targets
    wanted = {"logprobs"} if loss.groups else set()  # groups need normalisers, which follow from the top-k
    if "ids" in loss.needs:
        wanted |= {"token_ids", "logprobs"} if _has_ids(config) else set()
        if objective.tail == "sampled":
            wanted = {"sample_ids"} if config.samples else wanted | {"tail_ids"}
    if "bands" in loss.needs:
        wanted |= {"tail_bands"}
    return part_of(manifest, arrays=wanted & {a.name for a in manifest.arrays}).arrays


def as_read(config: TargetConfig, top_k: int | None) -> TargetConfig:
    """What a reader hands out that reads `top_k` tokens of each row: the draws from a tail are of none but the stored one."""
    fewer = top_k is not None and top_k < config.top_k
    return replace(config, tail_samples=0).normalised() if fewer and config.tail_samples else config


def _tail(config: TargetConfig, loss: str, tail: str, temperature: float) -> str:
    """The tail mode of a loss, `auto` filled in; DataError where the cache cannot serve it."""
    variants = LOSSES[loss].variants
    if "ghost" not in variants:
        if tail not in ("auto", *variants):
            raise unknown_name(f"tail mode of {loss}", tail, variants)
        return next(iter(variants))
    has_top_k, has_samples = _has_ids(config), bool(config.uniforms)
    if tail == "auto":
        drawn = bool(config.tail_samples) and temperature == 1.0
        tail = "sampled" if "sampled" in variants and (drawn or (has_samples and not has_top_k)) else "ghost"
    if tail not in variants:
        raise unknown_name(f"tail mode of {loss}", tail, variants)
    if (tail == "sampled" and not has_samples) or (tail != "sampled" and not has_top_k):
        raise DataError(
            f"this cache cannot serve --loss {loss} --tail {tail}",
            found=f"profile {config.profile}",
            expected="profile kl, compact, adaptive or full for ghost and renorm; sampled, full, or draws from the tail and all "
            "kept tokens for sampled",
            try_="kd cache build --profile kl, with --tail-samples 50 for sampled",
        )
    return tail


def _has_ids(config: TargetConfig) -> bool:
    return bool(config.top_k) and PROFILES[config.profile].ids and config.profile != "sampled"


def _check_holdings(config: TargetConfig, loss: str, temperature: float, logprobs_only: bool) -> None:
    """Raise DataError when an aligned loss needs what the cache's profile left out."""
    if not LOSSES[loss].any_tokenizer:
        return
    bands = bool(config.tail_bands) or logprobs_only  # whose tail is one band
    held = {"ids": _has_ids(config), "logprobs": bool(config.top_k), "bands": bands}
    missing = [need for need in LOSSES[loss].needs if not held[need]]
    if missing:
        bands_and_ids = {"ids", "bands"} <= {*LOSSES[loss].needs}
        serving = "full" if bands_and_ids else "kl or full" if "ids" in LOSSES[loss].needs else "uld or full"
        serving = "adaptive --tail-bands 16" if config.ragged else serving
        raise DataError(
            f"this cache cannot serve --loss {loss}",
            found=f"profile {config.profile} without {', '.join(missing)}",
            expected=f"profile {serving}",
            try_=f"{_other_losses(held)}kd cache build --profile {serving.partition(' or ')[0]}",
        )
    if "bands" in LOSSES[loss].needs and temperature not in config.band_temperatures:
        raise DataError(
            "this cache holds no rank bands at that temperature",
            found=f"--temperature {temperature:g}",
            expected=f"one of {', '.join(f'{t:g}' for t in config.band_temperatures)}",
            try_=f"kd cache build --temperatures 1,{temperature:g} --band-temperatures {temperature:g}",
        )
