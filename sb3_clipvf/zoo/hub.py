"""The Hugging Face hub: commands in model cards, downloads of agents, and errors of the RL Zoo's list of agents."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import repocard
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from requests.exceptions import HTTPError
from rl_zoo3 import utils

from sb3_clipvf.zoo.commands import ALGORITHM
from sb3_clipvf.zoo.patching import patched

_OWN_TEXTS = {
    "python -m rl_zoo3.": "python -m sb3_clipvf ",
    "Install the RL Zoo (with SB3 and SB3-Contrib):": "In a clone of sb3_clipvf, install it with the RL Zoo:",
    "If you installed the RL Zoo3 via pip (`pip install rl_zoo3`), from anywhere": "After that, from anywhere",
    "pip install rl_zoo3": "pip install -c constraints.txt .",
}
"""Texts of the RL Zoo's model card, and those for ClipPPO, in the order in which they are replaced."""


@contextmanager
def own_model_card() -> Iterator[None]:
    """Fix an import of ``rl_zoo3.push_to_hub``, and write this package's commands to its model cards."""
    # Not `from huggingface_sb3 import`: that name is a function there.
    push_to_hub = importlib.import_module("huggingface_sb3.push_to_hub")
    save = repocard.metadata_save

    def metadata_save(local_path: str | Path, data: dict[str, Any]) -> None:
        card = Path(local_path)
        card.write_text(own_commands(card.read_text(encoding="utf-8")), encoding="utf-8")
        save(local_path, data)

    with patched(hub_card=metadata_save, hub_metadata=lambda *args: push_to_hub._generate_metadata(*args).to_dict()):
        yield


def own_commands(card: str) -> str:
    """Replace the RL Zoo's commands in the model card of a ClipPPO, since they do not support the algorithm."""
    if f"--algo {ALGORITHM} " not in card:
        return card
    for text, own_text in _OWN_TEXTS.items():
        card = card.replace(text, own_text)
    return card


@contextmanager
def own_downloads() -> Iterator[None]:
    """Download agents without ``TRUST_REMOTE_CODE``, since no file is unpickled before it is checked."""

    def load_from_hub(repo_id: str, filename: str) -> str:
        try:
            return huggingface_hub.hf_hub_download(repo_id, filename)
        except RemoteEntryNotFoundError as error:
            # The error that the Zoo expects for an agent without statistics.
            raise HTTPError(
                f"{repo_id} on the Hugging Face hub must be an agent of the RL Zoo, got no {filename}. Correct "
                "`--algo`, `--env` or `-name`."
            ) from error
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"`-orga` and `-name` must name a repository of the Hugging Face hub, got {repo_id}, which does not "
                "exist or needs a login. Correct them, or log in by `hf auth login`."
            ) from error

    with patched(hub_download=load_from_hub):
        yield


@contextmanager
def explained_listing() -> Iterator[None]:
    """Raise an error that names ``--no-hub`` if the agents of the Hugging Face hub cannot be listed."""
    listed = utils.get_hf_trained_models

    def list_models(*args: Any, **kwargs: Any) -> dict[str, tuple[str, str]]:
        try:
            return listed(*args, **kwargs)
        except Exception as error:  # each version of huggingface_hub has its own errors
            text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ConnectionError(
                f"`--no-hub` must be given if the Hugging Face hub cannot be read, got: {text}. Pass it to evaluate "
                "only the agents of `--log-dir`."
            ) from error

    with patched(hub_models=list_models):
        yield
