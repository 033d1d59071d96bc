"""The model card that goes to the hub."""

import importlib
from pathlib import Path

from huggingface_hub import repocard

from sb3_clipvf.zoo.hub import own_commands, own_model_card

push_to_hub = importlib.import_module("huggingface_sb3.push_to_hub")

CARD = "pip install rl_zoo3\npython -m rl_zoo3.enjoy --algo {algo} --env CartPole-v1 -f logs/\n"


def test_commands_of_a_card_know_clipppo() -> None:
    expected = (
        "pip install -c constraints.txt .\npython -m sb3_clipvf enjoy --algo clipppo --env CartPole-v1 -f logs/\n"
    )
    assert own_commands(CARD.format(algo="clipppo")) == expected


def test_cards_of_other_algorithms_do_not_change() -> None:
    card = CARD.format(algo="ppo")
    assert own_commands(card) == card


def test_the_hub_integration_offers_what_the_zoo_imports(tmp_path: Path) -> None:
    save, had_it = repocard.metadata_save, hasattr(push_to_hub, "generate_metadata")
    readme = tmp_path / "README.md"
    readme.write_text(CARD.format(algo="clipppo"))
    with own_model_card():
        metadata = push_to_hub.generate_metadata("ClipPPO", "CartPole-v1", 500.0, 0.0)
        repocard.metadata_save(readme, metadata)
    text = readme.read_text()
    assert "library_name: stable-baselines3" in text
    assert "python -m sb3_clipvf enjoy" in text
    assert repocard.metadata_save is save
    assert hasattr(push_to_hub, "generate_metadata") == had_it
