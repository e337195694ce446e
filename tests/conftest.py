"""Fixtures shared by all tests: real data where it is there, a tokenizer, a tiny model and a small cache."""

from __future__ import annotations

import os
import shutil
import subprocess

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of a hub client: no test may reach the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from servers import HubServer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.store.records.manifest import Layout
from kd.cache_builder.store.targets import TargetConfig
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.model_request import ModelRequest

torch.set_num_threads(1)
settings.register_profile("kd", deadline=None)  # no test fails because a machine is busy
settings.load_profile("kd")

END = "<|endoftext|>"
SMALL = Layout(shard_rows=128, chunk_rows=32)

STORIES = [
    "Once upon a time there was a small fox who lived at the edge of the wood. Every morning the fox went down "
    "to the river to look at the fish, and every evening it came home with a story to tell.",
    "The keeper of the lighthouse counted the ships. There were seven ships on Monday, five on Tuesday, and on "
    "Wednesday there was fog, so he counted the sounds of the bells instead: ding, dong, ding.",
    "Café crème costs 3 € in the old town — “too much”, said the baker, who sold naïve éclairs for less. 日本語 "
    "is written without spaces; 😀 and 👩‍👩‍👧 are longer than they look.",
    "def count(ships):\n\treturn {name: len(name) for name in ships}\n\nThe function above counts letters, not ships.",
    "A very short one.",
    "The fox, the keeper and the baker met once, by accident, on a bridge over the river. They talked about the "
    "weather, about the price of fish, and about bells, and then each of them went home to tell a story about it.",
    "Numbers such as 1, 2, 4, 8, 16, 32, 64, 128 and 256 double; numbers such as 1, 1.5 and 3 do not.",
    "It rained. It rained for a day and a night, and the river rose to the foot of the bridge, and then it stopped.",
]


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of one test are not found by another."""
    monkeypatch.setenv("KD_HOME", str(tmp_path_factory.mktemp("kd-home")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real tokenizers, weights and texts; tests that need it are skipped where it is absent."""
    named = os.environ.get("KD_SHARED")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "tokenizers").is_dir():
        pytest.skip(f"no shared data in {folder} (set KD_SHARED)")
    return folder


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """An S3 server."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A proxy before the S3 server, with an empty bucket `shared`, spoken to by everything that reads AWS_ENDPOINT_URL."""
    import s3fs
    from servers import Proxy

    proxy = Proxy(moto)
    for name, value in (
        ("AWS_ENDPOINT_URL", proxy.url),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    if files.exists("shared"):
        files.rm("shared", recursive=True)
    files.mkdir("shared")
    proxy.log.clear()
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def load_benchmark():
    """`load_benchmark(name)`: a script of benchmarks/ as a module, always the same one."""
    folder, loaded = Path(__file__).parents[1] / "benchmarks", {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module.__name__] = loaded[name] = module  # dataclasses look their module up
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(str(folder))  # they import each other by bare names
                spec.loader.exec_module(module)
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 ids with `<|endoftext|>` as BOS and EOS, in the layout of the embedded one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(STORIES * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path):
    from kd.models.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="session")
def save_model():
    """`save_model(folder, seed=…)`: a GPT-2 of 2 layers, d=32, 64 positions; weights that give peaked predictions."""

    def save(folder: Path, *, seed: int = 0, vocab: int = 400) -> None:
        save_gpt2(folder, seed, vocab_size=vocab, initializer_range=0.4)

    return save


@pytest.fixture(scope="session")
def save_student(tokenizer_dir: Path):
    """`save_student(folder, seed=…, dropout=…, …)`: the same shape, or another, as `GPT2Config` starts it; the tokenizer too."""

    def save(folder: Path, *, seed: int = 1, dropout: float = 0.0, **shape: Any) -> Path:
        save_gpt2(folder, seed, **{f"{part}_pdrop": dropout for part in ("resid", "embd", "attn")} | shape)
        return shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)

    return save


def save_gpt2(folder: Path, seed: int, **changes: Any) -> None:
    """A random GPT-2 of 400 ids, 64 positions, 2 layers, d=32, without dropout, but for `changes`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {
        "vocab_size": 400,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        GPT2LMHeadModel(GPT2Config(**shape | changes)).save_pretrained(folder)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, save_model) -> Path:
    """The tiny GPT-2 beside its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def t5_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 with peaked predictions, 320 logits, and a unigram tokenizer that loses white space as T5's does."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([s.replace("🦊", "") for s in STORIES] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shape = T5Config(
        vocab_size=320,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        architectures=["T5ForConditionalGeneration"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(shape)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(320, 32) * 0.7)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short documents in one file."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(f"\n{END}\n".join(STORIES), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def build_request(model_dir: Path, text_file: Path):
    """`build_request(out, …)`: a small build of the stories in several shards of at most 128 rows."""

    def make(
        out: Path,
        *,
        model: Path | str = model_dir,
        text: Path = text_file,
        profile: str = "kl",
        seq_len: int = 32,
        tokens_per_batch: int = 128,
        layout: Layout | None = SMALL,
        shard: tuple[int, int] = (1, 1),
        dtype: str = "auto",
        **targets: Any,
    ) -> BuildRequest:
        if profile != "sampled":
            targets = {"top_k": 8, **targets}
        return BuildRequest(
            out=out,
            teacher=ModelRequest(str(model), device="cpu", dtype=dtype),
            corpus=load_corpus(str(text)),
            blocks=BlockConfig(seq_len=seq_len),
            targets=TargetConfig.of_profile(profile, **targets),
            layout=layout,
            tokens_per_batch=tokens_per_batch,
            shard=shard,
        )

    return make


@pytest.fixture(scope="session")
def run_build():
    """Plan and build to the end; returns every progress record."""

    def run(request: BuildRequest) -> list:
        return list(build(plan_build(request)))

    return run


@pytest.fixture(scope="session")
def tree():
    """Every file under a folder, hidden ones too, with its bytes."""

    def read(root: Path) -> dict[str, bytes]:
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if not p.is_dir()}

    return read


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """A finished `full` cache (top-k, draws, bands, boundaries) of the stories; copy it before damaging it."""
    out = tmp_path_factory.mktemp("caches") / "full"
    run_build(build_request(out, profile="full", samples=4, tail_bands=4))
    return out


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `full` cache of the embedded teacher over a few pages of text; made by the command line, copy it before changing it."""
    from click.testing import CliRunner

    from kd.cli import cli

    folder = tmp_path_factory.mktemp("demo-cache")
    (folder / "text.txt").write_text(f"\n{END}\n".join(STORIES * 3), encoding="utf-8")
    options = ["--profile", "full", "--samples", "4", "--temperatures", "1,2", "--seq-len", "64", "--device", "cpu"]
    where = ["--teacher", "demo", "--data", str(folder / "text.txt"), "--out", str(folder / "cache")]
    done = CliRunner().invoke(cli, ["cache", "build", *where, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "cache"


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mounted(options)`: a small file system; with `ro` it is written to no more."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options or "size=8m", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, spoken to by the hub's own client as it would through HF_ENDPOINT."""
    from huggingface_hub import constants

    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # what HF_ENDPOINT sets, were it there at import
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.close()
