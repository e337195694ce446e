"""From settings to a cache: `request_of` reads the text and the teacher's configuration, `plan_of` says what would be built,
`build_of` builds it.

    last = build_of(make(BuildSettings, {"teacher": "demo", "spec": "demo", "limit": 20, "out": "runs/cache"}))

`kd cache build`, `kd cache plan`, `kd cache repair` and the demo call these. The steps yield progress records;
`watch` drives them, so that the command line can draw a bar where Python callers need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

from kd.cache_builder.build.build_settings import BuildSettings, RunningSettings
from kd.cache_builder.build.builder import BuildProgress, build
from kd.cache_builder.build.generate import answered, generate
from kd.cache_builder.build.object_store.staged_output import staged
from kd.cache_builder.build.plan import BuildPlan, extended, plan_steps
from kd.cache_builder.build.request import BuildRequest, GenerationConfig
from kd.cache_builder.build.together.engines import build_together
from kd.cache_builder.build.together.ray_cluster import for_cluster
from kd.cache_builder.served.serving import Serving
from kd.cache_builder.store.records.commits import committed, existing_cache
from kd.cache_builder.store.records.manifest import Layout, load_manifest
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.tokens.text_sample import TextSample, draw_sample
from kd.cache_builder.tokens.token_folder import no_tokens_of_refused, token_folder
from kd.cache_builder.tokens.token_pass import COUNTS, IN_MEMORY, Keep
from kd.cache_builder.upkeep.cache_registry import caches_with, remember
from kd.common.disk.disk_errors import free_bytes
from kd.common.errors import DataError
from kd.common.paths import StoreAddress
from kd.common.progress import AnyStep
from kd.common.settings import changed
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.instruction_tasks.glue import CLASSES
from kd.data.left_out import LeftOut
from kd.data.rows.row_reading import AUTO
from kd.data.sources import load_classes, stream_text
from kd.data.text_stream import Text, without_examples
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.families.positions import max_positions
from kd.models.loading import load_model, refuse_unusable_map
from kd.models.model_config import is_classifier, is_encoder_decoder, load_config
from kd.models.model_request import ModelRequest
from kd.models.placement.device_maps import Placement
from kd.models.placement.tensor_parallel import run_in_group
from kd.models.weights.adapters import Adapter

Built = TypeVar("Built")
SEQ_LEN, ENCODER_SEQ_LEN = 512, 1024
"""Default sequence lengths, where the teacher's positions allow them."""
ENCODER_TARGET_LEN = 256
"""Default target length of an encoder-decoder."""
PILOT_TEXTS = 200
"""Documents, pairs or conversations of which a pilot takes its rows."""
ANSWER_TOKENS = 255
"""Default length of an answer that the teacher writes; with its EOS token it is a target of 256."""


QUICK = 4
"""Steps of the pass over a text that are not shown: a text of some megabytes takes no more."""


class Watch(Protocol):
    """Drives the steps of a stage to their end, and returns the last one."""

    def __call__(self, stage: str, steps: Iterator[AnyStep]) -> AnyStep: ...


def in_silence(stage: str, steps: Iterator[AnyStep]) -> AnyStep:
    """Drive the steps and show nothing."""
    *_, last = steps
    return last


def request_of(settings: BuildSettings) -> BuildRequest:
    """What to build: the text is read, and the lengths that nobody gave follow the teacher's configuration.

    Raises DataError for text or settings that cannot be used, TeacherError where the teacher has no configuration.
    """
    teacher = model_request(settings)
    config = load_config(teacher)
    return assembled(settings, teacher, config, lambda: corpus_of(settings, classes=is_classifier(config)))


def assembled(settings: BuildSettings, teacher: ModelRequest, config: Any, read: Callable[[], Text]) -> BuildRequest:
    """The request for a teacher with this configuration over the text that `read` gives.

    Settings are checked before the text is read, which may have to be fetched.
    """
    targets, blocks = target_config(settings, config), block_config(settings, config)
    return BuildRequest(
        out=Path(settings.out),
        url=settings.out if isinstance(settings.out, StoreAddress) else None,
        teacher=teacher,
        corpus=read(),
        blocks=blocks,
        targets=targets,
        layout=layout_of(settings.shard_rows),
        tokens_per_batch=settings.model.tokens_per_batch,
        shard=settings.running.shard,
        wait=settings.running.wait,
        tokenize_workers=settings.running.tokenize_workers,
        chat=chat_settings_of(settings),
        generation=generation_config(settings),
        extend=settings.running.extend,
        serving=serving_of(settings),
    )


def serving_of(settings: BuildSettings) -> Serving | None:
    """The engine that runs the teacher; None where transformers does."""
    served, running = settings.served, settings.running
    if not served.served:
        return None
    return Serving(
        served.teacher_url,
        served.served_model,
        served.teacher_id,
        served.server_api,
        running.tokens_in_flight,
        running.patience,
        served.tensor_parallel,
        served.pipeline_parallel,
    )


def model_request(settings: BuildSettings) -> ModelRequest:
    """The teacher, before anything is loaded."""
    model, placed = settings.model, settings.placement
    return ModelRequest(
        model.teacher,
        model.revision,
        model.dtype,
        model.device,
        model.load_in_4bit,
        model.tokenizer,
        settings.seed,
        model.source_lang,
        model.target_lang,
        Placement.of(placed.device_map, placed.max_memory, placed.offload_folder, settings.served.processes),
        model.load_in_8bit,
        None if model.teacher_adapter is None else Adapter(model.teacher_adapter, model.adapter_revision),
    )


def target_config(settings: BuildSettings, config: Any) -> TargetConfig:
    """What is kept of each row: the profile's own numbers, except where others are given.

    Of a classifier's few classes all are kept, as they are.
    """
    kept, classes = settings.kept, is_classifier(config)
    return TargetConfig.of_profile(
        kept.profile,
        top_k=int(config.num_labels) if classes and kept.top_k is None else kept.top_k,
        samples=kept.samples,
        tail_bands=kept.tail_bands,
        min_probability=kept.min_probability,
        min_k=kept.min_k,
        certain_below=kept.certain_below,
        tail_samples=kept.tail_samples,
        id_codec=kept.id_codec,
        temperatures=kept.temperatures or ((1.0,) if settings.served.served else (1.0, 2.0, 4.0)),
        band_temperatures=kept.band_temperatures or (1.0,),
        logprob_codec=kept.logprob_codec or ("float32" if classes else None),
        seed=settings.seed,
    )


def block_config(settings: BuildSettings, config: Any) -> BlockConfig:
    """How the text is cut for a teacher with this configuration."""
    blocks, window, encoder = settings.blocks, max_positions(config), is_encoder_decoder(config)
    longest = ENCODER_SEQ_LEN if encoder else SEQ_LEN
    written = max_positions(config, decoder=True)
    most_written = ENCODER_TARGET_LEN if written is None else min(ENCODER_TARGET_LEN, written - 1)  # one may be forced
    return BlockConfig(
        seq_len=blocks.seq_len or min(longest, window or longest),
        stride=blocks.stride,
        bos=blocks.bos,
        eos=blocks.eos,
        separator=blocks.separator,
        encoder=encoder,
        target_len=blocks.target_len or (most_written if encoder else None),
        overlong=blocks.overlong,
        control_tokens=blocks.control_tokens,
    )


def corpus_of(settings: BuildSettings, *, classes: bool) -> Text:
    """The text, or the labelled rows for a classifier."""
    data, answered = settings.data, settings.answers.target_source == "teacher"
    columns = dict(data.columns or {})
    if answered and "prompt" in columns and data.format in (AUTO, "pairs"):
        columns = {"target": columns["prompt"], **columns}  # the teacher's answers replace these targets
    load: Callable[..., Text] = (
        load_classes if classes else partial(stream_text, prompts=answered, streaming=settings.running.streaming)
    )
    return load(
        data.spec,
        split=data.split,
        columns=columns,
        form=data.format,
        bad_rows=data.bad_rows,
        limit=data.limit,
        instructions=data.instructions,
        rows=data.rows,
    )


def layout_of(shard_rows: int | None) -> Layout | None:
    """Shards of so many rows; None leaves the choice to the plan."""
    return None if shard_rows is None else Layout(shard_rows, min(Layout.chunk_rows, shard_rows))


def generation_config(settings: BuildSettings) -> GenerationConfig | None:
    """How the teacher answers; None where the targets are the text's own."""
    if settings.answers.target_source == "data":
        return None
    longest = settings.blocks.target_len
    answers = settings.answers
    return GenerationConfig(
        longest - 1 if longest else ANSWER_TOKENS,
        answers.sample_temperature,
        settings.seed,
        answers.answers_per_prompt,
        answers.reasoning,
    )


def chat_settings_of(settings: BuildSettings) -> ChatSettings:
    """How conversations are rendered. Of those that the teacher answers, its answer alone is scored."""
    by_teacher = settings.answers.target_source == "teacher" and settings.chat.score == "assistant"
    return replace(settings.chat, score="last") if by_teacher else settings.chat


def plan_of(settings: BuildSettings, *, watch: Watch = in_silence) -> BuildPlan:
    """The plan of a build; an upper bound where the teacher is to write the targets and has not. Nothing is written."""
    with staged(request_of(settings), writes=False) as here:
        if here.generation is not None and answered(here):
            here = with_answers(here, watch)
        return planned(here, COUNTS, watch)


def sampled_plan_of(settings: BuildSettings, count: int) -> tuple[BuildPlan, TextSample, LeftOut]:
    """The plan of a cache of `count` examples drawn from the text, the sample, and what reading the text left out.

    Nothing is written, and what lies in the folder of the build is not looked at. Raises DataError where the text is not read for
    its tokens.
    """
    request, left_out = request_of(settings), LeftOut()
    if request.generation is not None or request.corpus.kind == CLASSES:
        raise DataError(
            "only a text that is tokenised can be sampled",
            found="--targets teacher" if request.generation is not None else "texts to classify",
            try_="leave --plan-sample out",
        )
    sample = draw_sample(request.corpus.reading(left_out), count, seed=settings.seed)
    corpus = replace(without_examples(request.corpus), examples=sample.drawn)
    with TemporaryDirectory(prefix="kd-plan-") as folder:
        drawn = replace(request, corpus=corpus, out=Path(folder), url=None)
        return planned(drawn, IN_MEMORY, in_silence), sample, left_out


def pilot_plan_of(settings: BuildSettings) -> BuildPlan:
    """The plan of the same build over the first `PILOT_TEXTS` examples, with its rows in memory. Nothing is written."""
    limit = min(settings.data.limit or PILOT_TEXTS, PILOT_TEXTS)
    with staged(request_of(changed(settings, limit=limit)), writes=False) as here:
        return planned(here, IN_MEMORY, in_silence)


def build_of(
    settings: BuildSettings,
    *,
    recorded: Mapping[str, str | bool] | None = None,
    watch: Watch = in_silence,
    say: Callable[[str], object] = lambda message: None,
) -> BuildProgress:
    """Build a cache, or continue one; returns the last progress record. Raises KdError; what is committed stays.

    recorded  the options as they were typed, which the cache keeps for `kd cache repair`
    watch     drives each stage (the teacher's answers, then the build)
    say       is told in a sentence when the shards of another cache are copied
    """
    request = replace(request_of(settings), options=recorded)
    return build_request(request, settings.running, watch=watch, say=say)


def build_request(
    request: BuildRequest,
    running: RunningSettings,
    *,
    watch: Watch = in_silence,
    say: Callable[[str], object] = lambda message: None,
) -> BuildProgress:
    """`build_of` for a request that is made already."""
    if running.engine == "local":  # the machines of a cluster may have other GPUs
        refuse_unusable_map(request.teacher)
    if running.engine == "ray":
        request = for_cluster(request)
    with staged(request) as here, no_tokens_of_refused(here.out):
        if here.generation is not None:
            here = with_answers(here, watch)
        plan = planned(here, Keep(token_folder(here.out)), watch)
        if running.reuse and here.extend is None and existing_cache(here.out) is None:
            plan = with_shards_of_an_equal_cache(plan, say)
        say_where_room_is_short(plan, say)
        last = watch("building", builders(plan, running, say))
    if last.complete and request.url is None:
        remember(request.out, request.options)
    return last


def build_in_groups(settings: BuildSettings, build: Callable[[BuildSettings, bool], Built]) -> Built | None:
    """One of torchrun's processes of a build with a tensor-parallel teacher.

    `build(settings, first)` runs in the process that leads its group, with the settings of one builder; `first` says whether
    the group is the first. The others follow, and their answer is None.
    """
    groups = settings.running.workers
    one_builder = changed(settings, workers=1, wait=settings.running.wait or groups > 1)
    return run_in_group(
        settings.served.processes, groups, load_model, lambda group: build(one_builder, group.number == 0)
    )


def planned(request: BuildRequest, keep: Keep, watch: Watch) -> BuildPlan:
    """The plan. `watch` drives the pass over the text where it takes more than a moment."""
    steps = plan_steps(request, keep)
    for step in islice(steps, QUICK):
        if step.result is not None:
            return step.result
    last = watch("tokenising", steps)
    assert last.result is not None
    return last.result


def with_answers(request: BuildRequest, watch: Watch = in_silence) -> BuildRequest:
    """The request with the teacher's answers as targets; the teacher writes those that are not on disk yet."""
    last = watch("generating", generate(request))
    assert last.result is not None
    return last.result


def with_shards_of_an_equal_cache(plan: BuildPlan, say: Callable[[str], object]) -> BuildPlan:
    """The plan, to be filled from a cache of the same fingerprint where one was finished on this machine."""
    request = plan.request
    if plan.manifest.weights_unknown and plan.manifest.identity["teacher"]["id"] is None:
        return plan  # nothing says that the weights were the same
    for path in caches_with(plan.manifest.fingerprint):
        if request.layout in (None, load_manifest(path).layout) and path != request.out.resolve():
            say(f"the same cache was built at {path}: its shards are copied")
            return extended(plan, path)
    return plan


def say_where_room_is_short(plan: BuildPlan, say: Callable[[str], object]) -> None:
    """Say beforehand that the disk may not hold what is left of a cache. Its compressed size is known only afterwards."""
    request, shards = plan.request, plan.manifest.shards
    if request.url is not None:
        return
    left = plan.manifest.rows * (1 - len(committed(request.out, len(shards))) / len(shards))
    most, free = left * plan.raw_bytes_per_token, free_bytes(request.out)
    if free < most:
        say(
            f"the disk has {free / 1e9:.1f} GB free, and what is left of this cache takes up to {most / 1e9:.1f} GB before "
            "compression; a build that finds the disk full stops, and continues when there is room"
        )


def builders(plan: BuildPlan, running: RunningSettings, say: Callable[[str], object]) -> Iterator[BuildProgress]:
    """Build here, or with several builders at once."""
    if running.workers == 1 and running.engine == "local":
        return build(plan)
    return build_together(plan, workers=running.workers, engine=running.engine, restarts=running.restarts, say=say)
