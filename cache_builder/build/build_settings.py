"""Settings of a build: which teacher, which text, how it is cut, what is kept of each row, and how the build runs.

    settings = make(BuildSettings, {"teacher": "demo", "spec": "demo", "out": "runs/cache", "top_k": 16})

The flat names are the options of `kd cache build` and `kd cache plan`, the keys of their `--config` file, and what a
cache records so that `kd cache repair` can build its shards again. This module imports neither torch nor transformers:
the command line reads it to print its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kd.cache_builder.served.served_settings import ServedSettings
from kd.cache_builder.store.profiles import CODEC_NAMES, ID_CODECS, PROFILES
from kd.common.errors import DataError
from kd.common.paths import StoreAddress, build_output
from kd.common.setting_fields import settings_of
from kd.common.setting_values import unescaped
from kd.common.settings import check, setting
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.data_settings import RequiredDataSettings
from kd.models.model_request import DTYPES
from kd.models.placement.device_maps import memory_from

RESTARTS = 3
"""Times that each of several builders is started again when it is lost."""


def part_from(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises ValueError."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise ValueError("I/N, e.g. 2/8")
    return int(index), int(count)


@dataclass(frozen=True)
class TeacherSettings:
    """The model that predicts, and how it is loaded."""

    teacher: str
    """Teacher model: a hub id, a folder, demo, demo-t5, or random:NAME. With --data glue/TASK it is a classifier."""
    revision: str | None = None
    """Branch, tag or commit of a teacher on the hub. By default its main branch."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer. By default it is read from beside the teacher."""
    dtype: str = setting("auto", choices=DTYPES)
    """Number type of the teacher's weights; auto is float32 on a CPU and the stored type on a GPU."""
    device: str = "auto"
    """Device of the teacher: auto, cpu, cuda or cuda:N; auto is cuda where there is a GPU."""
    load_in_4bit: bool = False
    """Load the teacher in nf4 with double quantisation (bitsandbytes)."""
    load_in_8bit: bool = False
    """Load the teacher in 8 bits, LLM.int8 (bitsandbytes)."""
    teacher_adapter: str | None = setting(None, metavar="FOLDER|HUB_ID")
    """Adapter (LoRA) to merge into the teacher's weights: a folder that peft wrote, or a hub id."""
    adapter_revision: str | None = None
    """Branch, tag or commit of an adapter on the hub. By default its main branch."""
    source_lang: str | None = setting(None, metavar="CODE", shown="the tokenizer's own")
    """Language code of the prompts, for an encoder-decoder whose tokenizer writes one (mBART: fr_XX, NLLB: fra_Latn)."""
    target_lang: str | None = setting(None, metavar="CODE", shown="the tokenizer's own")
    """Language code of the targets, likewise."""
    tokens_per_batch: int | None = setting(
        None, minimum=1, shown="4096; on a CPU 512 for each side of the model, with one batch per thread"
    )
    """Tokens per forward pass, padding included. The number is halved when memory runs out."""

    def __post_init__(self) -> None:
        check(self)
        if self.adapter_revision is not None and self.teacher_adapter is None:
            raise DataError(
                "there is no adapter", found=f"--adapter-revision {self.adapter_revision}", try_="--teacher-adapter"
            )


@dataclass(frozen=True)
class PlacementSettings:
    """Where the weights of a teacher lie that is larger than one device."""

    device_map: str | None = setting(
        None, metavar="auto|balanced|sequential|FILE", shown="the whole teacher on one device"
    )
    """Spread the teacher's layers over the GPUs, the processor's memory and the disk, as accelerate does: auto and balanced
    fill the GPUs evenly, sequential one after another. FILE is YAML or JSON, with module: device in each line."""
    max_memory: Mapping[str, str] | None = setting(
        None, metavar="DEVICE=SIZE,…", parse=memory_from, shown="what is free"
    )
    """Most memory for weights on each device, e.g. 0=20GiB,1=20GiB,cpu=60GiB. What these do not hold lies on the disk."""
    offload_folder: Path | None = setting(None, metavar="FOLDER", folder=True, shown="the checkpoint itself")
    """Folder for weights on the disk, needed where they cannot be read from the checkpoint itself."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class BlockSettings:
    """How text is cut into sequences."""

    seq_len: int | None = setting(None, shown="512, or the teacher's positions if fewer; 1024 for an encoder")
    """Tokens of a sequence, context included; for an encoder-decoder, tokens of the prompt."""
    target_len: int | None = setting(None, shown="what --seq-len leaves; 256 for an encoder-decoder")
    """Largest number of target tokens of a pair, EOS included."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What happens to prompt/target pairs that are too long: error stops the build, drop leaves them out, truncate cuts
    the target's end and the prompt's beginning."""
    stride: int | None = setting(None, shown="seq-len - 1")
    """New tokens scored per block of a document; the rest of a block is context."""
    bos: bool = True
    """Begin documents and prompts with the BOS token, where the tokenizer has one."""
    eos: bool = False
    """Score an EOS token after each document."""
    separator: str = setting("\n", typed=unescaped)
    """Text between the prompt and the target of a pair."""
    control_tokens: Literal["auto", "control", "text"] = "auto"
    """How a special token that is spelled in a text is read. control: as that token; text: as its characters; auto: as the
    token in prompts, and in documents that begin or end with one, and as text elsewhere."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class TargetSettings:
    """What is kept of the teacher's distribution for each row."""

    profile: str = setting("kl", choices=PROFILES)
    """What is kept of each row: kl (top-k), compact (top-k, coarser), adaptive (the tokens above a probability), uld
    (probabilities without ids, and rank bands), sampled (seeded draws), or full (all but adaptive)."""
    top_k: int | None = setting(None, shown="the profile's own number")
    """Tokens kept per row, the most probable first; with the profile adaptive, the most that a row keeps."""
    min_probability: float | None = setting(None, shown="the profile's own number")
    """Least probability of a kept token (profile adaptive). Rows where the teacher is sure are then short."""
    min_k: int | None = setting(None, shown="1; 2 with --certain-below")
    """Tokens that every row keeps, however improbable (profile adaptive). Certain rows are an exception."""
    certain_below: float | None = setting(None, metavar="NATS", shown="no row is certain")
    """Entropy in nats below which a row is certain: it keeps its most probable token alone, and the tail (profile adaptive). 0.1,
    say. The teacher alone decides, so any student can use the cache."""
    samples: int | None = setting(None, shown="the profile's own number")
    """Draws from the distribution kept per row (profiles sampled and full)."""
    tail_samples: int | None = setting(None, shown="none")
    """Draws from what lies beyond the kept tokens, so that kl at temperature 1 has the gradient of the whole distribution on
    average. A row whose tail has the probability m draws this number times m, rounded up (profiles kl, compact and adaptive)."""
    tail_bands: int | None = setting(None, shown="the profile's own number")
    """Rank bands beyond the kept tokens whose probability is kept (profiles uld and full; adaptive where it is given)."""
    temperatures: tuple[float, ...] | None = setting(None, shown="1,2,4; 1 for a served teacher")
    """Temperatures whose exact normaliser is stored, separated by commas; 1 must be among them."""
    band_temperatures: tuple[float, ...] | None = setting(None, shown="1")
    """Temperatures whose rank bands are stored, separated by commas."""
    logprob_codec: str | None = setting(None, choices=CODEC_NAMES, shown="the profile's own codec")
    """Encoding of the log-probabilities: graded, graded-fine and graded-coarse are finer near the top; linear8 has equal
    steps; float16 and float32 are plain numbers."""
    id_codec: str | None = setting(None, choices=ID_CODECS, shown="frequency")
    """Encoding of the kept tokens' ids: numbers by frequency, or places in lists of the tokens that often follow the one before
    (7 to 25 % fewer bytes of ids, slightly slower to read)."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class AnswerSettings:
    """Whether the teacher writes the targets itself, and how."""

    target_source: Literal["data", "teacher"] = setting("data", flag="--targets")
    """Where the targets come from: data (the text's own), or teacher (it answers the prompts, and its answers are
    scored; --columns prompt=COLUMN is enough)."""
    sample_temperature: float = 0.0
    """Temperature at which the teacher's answers are sampled; 0 takes the most probable token each time."""
    answers_per_prompt: int = setting(1, minimum=1)
    """Number of answers that the teacher writes to each prompt, sampled with --seed. Each is an example of its own, ID~0,
    ID~1, and so on."""
    reasoning: Literal["keep", "strip"] = "keep"
    """What becomes of the reasoning that the teacher writes between <think> and </think>: keep scores it as part of the
    answer, strip leaves it out."""

    def __post_init__(self) -> None:
        check(self)
        if self.target_source == "data" and (self.answers_per_prompt > 1 or self.reasoning == "strip"):
            given = "--answers-per-prompt" if self.answers_per_prompt > 1 else "--reasoning strip"
            raise DataError(
                "the teacher writes no answers", found=f"{given} with --targets data", try_="--targets teacher"
            )
        if self.answers_per_prompt > 1 and not self.sample_temperature:
            raise DataError(
                "all answers to a prompt would be the same",
                found=f"--answers-per-prompt {self.answers_per_prompt} without sampling",
                try_="--sample-temperature 1",
            )
        if self.sample_temperature and self.target_source == "data":
            raise DataError(
                "nothing is sampled", found="--sample-temperature with --targets data", try_="--targets teacher"
            )


@dataclass(frozen=True)
class RunningSettings:
    """Who builds, and what is taken over from other caches; none of these changes a stored value."""

    shard: tuple[int, int] = setting((1, 1), parse=part_from, metavar="I/N", shown="1/1")
    """Build every N-th shard, starting with the I-th. All parts go into one --out folder that all machines see."""
    workers: int = setting(1, minimum=1)
    """Number of builders that run at once. Each takes a GPU, or a share of the processors."""
    restarts: int = setting(RESTARTS, minimum=0)
    """Number of times that each of several builders is started again when it is lost: killed, out of memory, or with its
    machine. After that the others do its work."""
    tokenize_workers: int | None = setting(None, minimum=1, shown="one for each processor, 16 at most")
    """Number of processes that tokenise the text. Texts of a few megabytes are tokenised by the command itself."""
    streaming: bool = False
    """Read a data set of the hub over the network while it is tokenised, and do not store it on this disk first. With --limit N the
    rest is neither read nor counted."""
    wait: bool = False
    """Wait for shards that other builders hold, and build those that they leave. Without it the command ends with exit
    code 4 where other builders hold shards."""
    engine: Literal["local", "ray"] = "local"
    """Where builders run: local starts processes on this machine; ray starts tasks on the cluster of RAY_ADDRESS."""
    extend: Path | None = setting(None, metavar="CACHE")
    """Cache of the beginning of this text. Its shards are copied, and the teacher scores only the rest."""
    tokens_in_flight: int = setting(16384, minimum=1)
    """Tokens that a server is asked about at once (--teacher-url)."""
    patience: float = setting(300.0, minimum=0)
    """Seconds for which a server that does not answer is asked again (--teacher-url)."""
    reuse: bool = True
    """Copy the shards of a cache with the same fingerprint that was finished on this machine (kd cache ls)."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Everything a build can be told."""

    model: TeacherSettings
    data: RequiredDataSettings
    served: ServedSettings = field(default_factory=ServedSettings)
    out: Path | StoreAddress = setting(folder=True, parse=build_output, metavar="FOLDER|s3://BUCKET/PATH")
    """Folder of the cache, or its address in an object store with conditional writes."""
    kept: TargetSettings = field(default_factory=TargetSettings)
    blocks: BlockSettings = field(default_factory=BlockSettings)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)
    placement: PlacementSettings = field(default_factory=PlacementSettings)
    seed: int = 0
    """Seed of the draws, of sampled answers, and of random weights."""
    shard_rows: int | None = setting(None, minimum=1, shown="32768")
    """Rows per shard. A shard is the unit of writing and of resuming."""
    running: RunningSettings = field(default_factory=RunningSettings)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class BillSettings:
    """How large a cache would be, and how fast it is to be made and read."""

    rows: int = setting(minimum=1)
    """Rows of the cache: the number of target tokens."""
    kept: TargetSettings = field(default_factory=TargetSettings)
    vocabulary: int = setting(50257, minimum=2)
    """Entries of the teacher's vocabulary; beyond 65,536 an id takes four bytes before compression in place of two."""
    shard_rows: int | None = setting(
        None, minimum=1, shown="as a build chooses it: 32,768, and more for a very large cache"
    )
    """Rows per shard."""
    gpu_rate: float = setting(5000.0, above=0)
    """Tokens per second that one GPU scores with the teacher. Measure it: kd cache build --limit 100 prints it."""
    training_rate: float = setting(100_000.0, above=0)
    """Rows per second that all GPUs of a training job take together."""
    read_ahead: int = setting(16, minimum=1)
    """Shards that a reader holds decoded."""

    def __post_init__(self) -> None:
        check(self)


RECORDED = (
    settings_of(BuildSettings).keys()
    - settings_of(RunningSettings).keys()
    - settings_of(PlacementSettings).keys()
    - {"out"}
)
"""Settings that a cache records: those that say what is in it."""


@dataclass(frozen=True)
class FidelitySettings:
    """What to keep of the teacher, found by a pilot."""

    fidelity: float | None = setting(None, metavar="ERROR", above=0)
    """Propose what to keep, so that the gradient of kl is at most so far off, relative to its length: 0.02, say. The teacher is
    loaded and reads some hundred rows."""
    fidelity_rows: int = setting(400, metavar="N", minimum=50)
    """Number of rows that --fidelity reads."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PlanSettings:
    """A build, and what a plan of it says besides its cost."""

    build: BuildSettings
    pilot: FidelitySettings = field(default_factory=FidelitySettings)
    plan_sample: int | None = setting(None, metavar="N", minimum=30, shown="tokenise the whole text")
    """Tokenise only N examples of the text, drawn with --seed, and estimate rows, bytes and time from them. The text is still read
    once, which counts its examples and characters. Each estimate has its error: half of its 95 % interval."""

    def __post_init__(self) -> None:
        check(self)
