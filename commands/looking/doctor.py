"""kd doctor: what this machine has, and what is missing for what."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from kd.commands.terminal.console import emit_json, readable, say
from kd.commands.terminal.options import json_option
from kd.common.byte_sizes import shown_bytes
from kd.common.disk.home import kd_home
from kd.common.extras import EXTRAS, is_installed

USES = {
    "train": "teachers, students, kd cache build, kd train",
    "eval": "kd eval, kd report, kd experiment",
    "quantization": "models in 4 and 8 bits",
    "lora": "adapters",
    "liger": "kd train --liger, on a GPU",
    "triton": "kd train --kernels triton, on a GPU; torch for CUDA brings it",
    "s3": "s3:// addresses",
    "ray": "builds on a Ray cluster",
    "vllm": "--backend vllm; it wants an environment of its own",
    "harness": "kd eval --tasks lm_eval:TASK",
    "trackers": "--report-to tensorboard, wandb or trackio",
}
"""Extra -> what needs it."""
BASE = ("kd-logit-cache", "zarr", "numcodecs", "numpy", "pyarrow", "huggingface_hub")
"""Packages of the base install whose versions are shown."""
HUB_SECONDS = 5.0


@click.command()
@click.option("--no-network", is_flag=True, help="Do not ask whether the hub can be reached.")
@json_option
def doctor(no_network: bool, as_json: bool) -> None:
    """Check this machine: versions, devices, extras, disk, and access to the hub. It changes nothing.

    Example: kd doctor
    """
    report = {
        "versions": versions(),
        "devices": devices(),
        "extras": {name: missing_of(name) for name in EXTRAS},
        "disk": disk(),
        "hub": hub(ask=not no_network),
    }
    if as_json:
        emit_json(report)
        return
    for title, facts in report.items():
        say(title)
        width = max(map(len, facts)) + 2
        for name, value in facts.items():
            say(f"  {name:<{width}}{_line(title, name, value)}")


def _line(title: str, name: str, value: Any) -> str:
    if title == "extras":
        if not value:
            return f"installed     ({USES[name]})"
        return f"missing {', '.join(value)}     ({USES[name]}): pip install 'kd-logit-cache[{name}]'"
    return shown_bytes(value) if title == "disk" or name == "memory" else readable(value)


def versions() -> dict[str, str]:
    """Python, the system, and every package that kd uses and that is here."""
    shown = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in (*BASE, *EXTRAS["train"], "peft", "bitsandbytes", "vllm"):
        try:
            shown[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return shown


def devices() -> dict[str, Any]:
    """Processors, memory, and GPUs as torch sees them."""
    hardware: dict[str, Any] = {"processors": len(os.sched_getaffinity(0)), "memory": _memory()}
    if not is_installed("torch"):
        return hardware | {"gpus": "unknown: torch is not installed"}
    import torch

    if not torch.cuda.is_available():
        return hardware | {"gpus": "none"}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return hardware | {"gpus": [f"{gpu.name}, {shown_bytes(gpu.total_memory)}" for gpu in gpus]}


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def missing_of(extra: str) -> list[str]:
    """Packages of an extra that are not installed."""
    return [package for package in EXTRAS[extra] if not is_installed(package)]


def disk() -> dict[str, int]:
    """Free bytes here, where kd keeps mirrors, and where Hugging Face keeps models."""
    hub_cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return {str(path): shutil.disk_usage(_existing(path)).free for path in (Path.cwd(), kd_home(), hub_cache)}


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return path if path.exists() else _existing(path.parent)


def hub(*, ask: bool) -> dict[str, Any]:
    """Whether the Hugging Face hub answers, and whether there is a token for it."""
    import requests
    from huggingface_hub import constants, get_token

    token = "there is one" if get_token() else "none: private and gated models are out of reach (hf auth login)"
    if constants.HF_HUB_OFFLINE:
        return {"access": "switched off by HF_HUB_OFFLINE", "token": token}
    if not ask:
        return {"access": "not asked", "token": token}
    try:
        status = requests.head(constants.ENDPOINT, timeout=HUB_SECONDS, allow_redirects=True).status_code
        access = f"{constants.ENDPOINT} answers" if status < 400 else f"{constants.ENDPOINT} answers with {status}"
    except requests.RequestException as error:
        access = f"{constants.ENDPOINT} cannot be reached: {type(error).__name__}"
    return {"access": access, "token": token}
