"""The finished student on the Hugging Face hub: `kd train --push-to-hub NAME/REPO`.

The repository is made before the first step, so that a missing token is noticed before the training and not after it. What is
uploaded at the end are the weights, the tokenizer, the model card, the records of steps and scorings, and their digests;
`run.json`, which names folders of this machine, and checkpoints stay here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.common.errors import DataError
from kd.student_trainer.saving.whole_models import ADAPTER_FOLDER

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
STAYS = ("run.json", "checkpoint-*", "best/*", ".*", "*.tmp")
"""Patterns of what is not uploaded."""


def prepare_repository(repository: str, *, private: bool) -> None:
    """Make the repository, if it is not there. Raises DataError where the hub does not let us."""
    if not REPOSITORY.fullmatch(repository):
        raise DataError(
            "this is not the name of a repository", found=f"--push-to-hub {repository}", expected="NAME/REPO"
        )
    from huggingface_hub import HfApi

    with refused_by_hub(repository, "hf auth login, or HF_TOKEN; and a NAME that is yours"):
        HfApi().create_repo(repository, private=private or None, exist_ok=True)


def upload_student(folder: Path, repository: str) -> str:
    """Upload a finished run in one commit; returns the address. Raises DataError; the run's folder stays as it is."""
    from huggingface_hub import HfApi

    again = f"hf upload {repository} {folder} . --exclude run.json --exclude 'checkpoint-*'"
    with refused_by_hub(repository, f"{again}: the student is whole in {folder}"):
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=["*", f"{ADAPTER_FOLDER}/*"],
            ignore_patterns=list(STAYS),
            commit_message="Add the student and its model card",
        )
    return f"{HfApi().endpoint}/{repository}"


@contextmanager
def refused_by_hub(repository: str, advice: str) -> Iterator[None]:
    """Turn the errors of the hub's client into DataError."""
    try:
        yield
    except Exception as error:  # its client, and the HTTP library below it, raise many unrelated types
        reason = (str(error).strip() or "-").splitlines()[0]
        answered = getattr(error, "response", None) is not None
        raise DataError(
            "the hub refused the student" if answered else "the hub cannot be reached",
            where=repository,
            found=f"{type(error).__name__}: {reason}",
            try_=advice if answered else f"the network, HF_ENDPOINT and HF_HUB_OFFLINE first; then {advice}",
        ) from error
