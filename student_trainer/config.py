"""`TrainConfig`: every setting of a training run, saved beside its weights.

    config = make(TrainConfig, {"cache": "runs/cache", "student": "demo", "out": "runs/student", "lr": 1e-3})
    config.optimization.lr

The command line, configuration files, `run.json` and Python all use the flat names; inside, settings are grouped by what
they belong to. This module imports nothing heavy: the command line reads it to print its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd.cache_builder.weighted_caches import WeightedCache, as_caches, parse_caches, require_weights
from kd.common.byte_sizes import byte_count
from kd.common.disk.home import kd_home
from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.common.setting_values import as_text, unescaped
from kd.common.settings import check, flat, make, setting
from kd.data.conversations.chat_settings import variables_from

LORA_TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
    "gpt_neo": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}
"""Model type -> modules that LoRA adapts."""

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "adamw8bit": "adamw_bnb_8bit"}
"""Our name -> transformers' name."""
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Our name -> transformers' name."""
"""Number formats of the training's matrix products."""

LossName = Literal["kl", "reverse-kl", "jsd", "uld", "hybrid", "alm", "ce"]
TailName = Literal["auto", "ghost", "sampled", "renorm"]
OptimizerName = Literal["adamw", "adafactor", "adamw8bit"]
ScheduleName = Literal["linear", "cosine", "constant"]
PrecisionName = Literal["fp32", "bf16"]
# tests compare each of these with its registry


ONE_DEVICE = "CUDA_VISIBLE_DEVICES=N chooses one device, torchrun or accelerate launch uses several"
"""What to try where a device is named by its number."""


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
class StudentSettings:
    """The model that is trained, and how it is run."""

    student: str
    """Model to train: hub id, folder, demo, demo-t5, or random:NAME."""
    revision: str | None = None
    """Branch, tag or commit of a hub student."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, for a random student."""
    source_lang: str | None = setting(None, metavar="CODE", shown="the tokenizer's own")
    """Language code of the prompts, for an encoder-decoder whose tokenizer writes one (mBART: fr_XX, NLLB: fra_Latn)."""
    target_lang: str | None = setting(None, metavar="CODE", shown="the tokenizer's own")
    """Language code of the targets, likewise."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", hint=ONE_DEVICE)
    """Device to train on. CUDA_VISIBLE_DEVICES=N selects one GPU; torchrun or accelerate launch uses several."""
    precision: PrecisionName = "fp32"
    """Precision of the matrix products: bf16 (autocast) or fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    head_chunk: int | None = setting(None, minimum=1, shown="by vocabulary and device")
    """Number of rows of the output layer computed at once."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def model_name(self) -> str:
        """The student as `kd.models.loading.ModelRequest` names it."""
        return "random:demo-student" if self.student == "demo" else self.student


@dataclass(frozen=True)
class LossSettings:
    """What the student minimises."""

    loss: LossName = "kl"
    """Loss to minimise. With the teacher's tokenizer: kl, reverse-kl, jsd. With any tokenizer: uld, hybrid, alm. ce
    fine-tunes on the same text, as the baseline."""
    tail: TailName = "auto"
    """How kl treats the probability outside the top-k: ghost (one extra outcome), sampled, or renorm. auto is ghost, or
    sampled where the cache holds draws alone."""
    alpha: float | None = setting(None, shown="1; 0.5 for uld, hybrid and alm")
    """Weight of the distillation loss."""
    ce_weight: float | None = setting(None, shown="1 - alpha")
    """Weight of the cross-entropy."""
    temperature: float = setting(1.0, above=0)
    """Temperature of both softmaxes; it must be on the cache's grid. Divergences are multiplied by its square."""
    beta: float = 0.5
    """Weight of KL(teacher || mixture) in jsd and hybrid, between 0 and 1."""
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


@dataclass(frozen=True)
class BatchSettings:
    """How many examples a step and the run see."""

    epochs: float = setting(1.0, above=0)
    """Passes over the cache."""
    max_steps: int | None = setting(None, minimum=1)
    """Number of optimizer steps; overrides --epochs."""
    tokens_per_batch: int | None = setting(None, minimum=1, shown="4096")
    """Most tokens per micro-batch and device, padding included."""
    batch_size: int | None = setting(None, minimum=1)
    """Number of examples or packed sequences per micro-batch and device, instead of a token budget."""
    packing: bool = False
    """Put several examples into one sequence of at most --seq-len tokens; none of them sees another."""
    accumulate: int = setting(1, minimum=1)
    """Number of micro-batches per optimizer step."""

    def __post_init__(self) -> None:
        check(self)
        if self.tokens_per_batch is not None and self.batch_size is not None:
            raise DataError("two batch sizes were given", found="--tokens-per-batch and --batch-size", expected="one")

    @property
    def token_budget(self) -> int | None:
        """Tokens per micro-batch; None where examples are counted."""
        return self.tokens_per_batch or (None if self.batch_size else 4096)


@dataclass(frozen=True)
class OptimizerSettings:
    """How a step changes the weights."""

    lr: float = setting(5e-4, above=0)
    """Peak learning rate."""
    weight_decay: float = setting(0.01, minimum=0)
    """Weight decay."""
    max_grad_norm: float = setting(1.0, minimum=0)
    """Largest norm of the gradient; larger ones are scaled down to it."""
    optimizer: OptimizerName = "adamw"
    """Optimizer: adamw, adafactor or adamw8bit (bitsandbytes)."""
    schedule: ScheduleName = "linear"
    """Course of the learning rate after the warm-up: linear or cosine decay, or constant."""
    warmup: float = setting(0.0, minimum=0)
    """Warm-up in steps, or as a share of all steps when below 1."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of all weights."""

    lora: int | None = setting(None, metavar="R", minimum=1)
    """Train LoRA adapters of rank R (peft), with alpha = 2 R; they are merged into the output. By default all weights are
    trained."""
    lora_targets: str | None = setting(None, shown="by the student's family, else all linear layers")
    """Names of the modules to adapt, separated by commas."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class LogSettings:
    """What is written while the run goes on. None of it changes the weights."""

    save_every: int = setting(0, minimum=0)
    """Number of steps between checkpoints; 0 saves at the end only."""
    log_every: int = setting(10, minimum=1)
    """Number of steps between lines of metrics.jsonl."""
    rescue_dir: str | None = setting(None, metavar="DIR", folder=True, shown="KD_HOME/rescue")
    """Folder in which the run goes on when --out can no longer be written: a full or read-only disk, no inodes."""
    report_to: str = "none"
    """Tracker that transformers reports to: tensorboard, wandb, …, or none."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def rescue_folder(self) -> Path:
        """`rescue_dir` as a path, with the default filled in."""
        return kd_home() / "rescue" if self.rescue_dir is None else Path(self.rescue_dir)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Equal settings, cache and library versions give equal weights on one machine."""

    data: CacheSettings
    model: StudentSettings
    out: str = setting(folder=True)
    """Folder of the run."""
    objective: LossSettings = field(default_factory=LossSettings)
    text: TextSettings = field(default_factory=TextSettings)
    batches: BatchSettings = field(default_factory=BatchSettings)
    optimization: OptimizerSettings = field(default_factory=OptimizerSettings)
    adapters: LoraSettings = field(default_factory=LoraSettings)
    logging: LogSettings = field(default_factory=LogSettings)
    seed: int = setting(0, minimum=0)
    """Seed of the order of examples, of dropout, and of random weights."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def folder(self) -> Path:
        """`out` as a path."""
        return as_path(self.out)

    def saved(self) -> dict[str, Any]:
        """Flat settings as `run.json` holds them."""
        return flat(self) | {"cache": as_text(self.data.cache)}

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued: everything but where and how often to write."""
        return {name: value for name, value in self.saved().items() if name not in FREE}


def config_from(settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration from settings by name; `cache` may be all that `open_cache` takes. Raises DataError."""
    given = {str(name).replace("-", "_"): value for name, value in settings.items()}
    if "cache" in given:
        given["cache"] = as_caches(given["cache"])
    return make(TrainConfig, given)


FREE = ("out", "cache", "cache_bytes", "save_every", "log_every", "rescue_dir", "report_to", "device")
"""Settings that a resumed run may change; of the cache, the fingerprint must be equal instead."""


def steps_or_epoch(text: str) -> int | str:
    """The value of --eval-every. Raises ValueError."""
    if text != "epoch" and not (text.isdigit() and int(text) >= 1):
        raise ValueError("a number of steps from 1, or epoch")
    return text if text == "epoch" else int(text)


@dataclass(frozen=True)
class ScoreSettings:
    """What `kd train` scores on held-out data: before and after, or while the student learns."""

    eval_data: str | None = None
    """Held-out data spec. Perplexity before and after training is shown in the result and in the model card."""
    eval_split: str | None = None
    """Split of --eval-data."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks of kd eval, separated by commas, to score while the student learns: before the first step, every --eval-every
    steps, and at the end. They use --eval-data (instruction tasks in template 0); agreement uses the cache."""
    eval_every: int | Literal["epoch"] = setting("epoch", metavar="N|epoch", parse=steps_or_epoch)
    """Number of steps between two scorings, or epoch."""
    eval_limit: int | None = setting(None, minimum=1)
    """Number of examples of each of --eval-tasks to use: the first N."""
    eval_task_root: Path | None = setting(None, metavar="DIR")
    """Folder with DIR/TASK/SPLIT.jsonl for --eval-tasks, instead of the hub."""
    eval_protocol: Literal["nanogpt", "harness"] = "nanogpt"
    """Protocol of hellaswag."""
    allow_contaminated: bool = False
    """Train on a benchmark's own text, or on the text of --eval-data; scores are then marked."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What is scored: perplexity alone where only --eval-data is given, nothing where neither is."""
        return self.eval_tasks or (("perplexity",) if self.eval_data else ())

    @property
    def steps_between(self) -> int | None:
        """Optimizer steps between two scorings; None = after every pass over the cache."""
        return None if isinstance(self.eval_every, str) else self.eval_every
