"""
The RL Zoo and the Hugging Face hub: its upload kept running, its model card made true for ClipPPO, and a way out where
the hub cannot be read.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def own_model_card(algorithm: str) -> Iterator[None]:
    """
    Make ``rl_zoo3.push_to_hub`` write a model card whose commands know ClipPPO.

    rl_zoo3 2.9.2 imports ``generate_metadata``, which sb3-team-hf-integration 3.2 calls ``_generate_metadata``; where
    the first is missing, the second takes its place meanwhile.

    :param algorithm: ClipPPO's name in the Zoo; cards of other algorithms stay as they are.
    """
    from huggingface_hub import repocard

    # Not `from huggingface_sb3 import`: that name is a function there.
    push_to_hub = importlib.import_module("huggingface_sb3.push_to_hub")
    save = repocard.metadata_save
    renamed = not hasattr(push_to_hub, "generate_metadata")

    def generate_metadata(*args: Any) -> dict[str, Any]:
        metadata: dict[str, Any] = push_to_hub._generate_metadata(*args).to_dict()
        return metadata

    def metadata_save(local_path: str | Path, data: dict[str, Any]) -> None:
        card = Path(local_path)
        card.write_text(own_commands(card.read_text(encoding="utf-8"), algorithm), encoding="utf-8")
        save(local_path, data)

    repocard.metadata_save = metadata_save
    if renamed:
        vars(push_to_hub)["generate_metadata"] = generate_metadata
    try:
        yield
    finally:
        repocard.metadata_save = save
        if renamed:
            del vars(push_to_hub)["generate_metadata"]


@contextmanager
def explained_listing() -> Iterator[None]:
    """Name ``--no-hub`` where ``rl_zoo3.benchmark`` cannot list the agents of the Hugging Face hub."""
    from rl_zoo3 import utils

    from sb3_clipvf.zoo.run_files import replaced  # imports torch

    listed = utils.get_hf_trained_models

    def get_hf_trained_models(*args: Any, **kwargs: Any) -> dict[str, tuple[str, str]]:
        try:
            return listed(*args, **kwargs)
        except Exception as error:  # each version of huggingface_hub has its own errors
            text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ConnectionError(
                f"`--no-hub` must be given where the Hugging Face hub cannot be read, got: {text}. It evaluates the "
                "agents of `--log-dir` alone."
            ) from error

    with replaced(utils, "get_hf_trained_models", get_hf_trained_models):
        yield


def own_commands(card: str, algorithm: str) -> str:
    """
    Replace the RL Zoo's commands in a model card, which would not know the algorithm.

    :param card: Text of the card.
    :param algorithm: ClipPPO's name in the Zoo.
    :return: The card with ``python -m sb3_clipvf`` in place of ``python -m rl_zoo3``, where it is about ClipPPO.
    """
    if f"--algo {algorithm} " not in card:
        return card
    return card.replace("python -m rl_zoo3.", "python -m sb3_clipvf ").replace(
        "pip install rl_zoo3", "pip install sb3_clipvf"
    )
