"""Each command finds the model asked for, and builds the environment of the training."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from gymnasium.wrappers import TimeLimit
from huggingface_sb3 import EnvironmentName
from rl_zoo3 import utils

from sb3_clipvf.zoo import main
from sb3_clipvf.zoo.entries import ZOO_KEYS
from sb3_clipvf.zoo.model_choice import has_model, own_models
from sb3_clipvf.zoo.run_folders import choose_run

RUN = Path("logs") / "clipppo" / "Pendulum-v1_1"
SETTINGS: dict[str, Any] = {
    "policy": "MlpPolicy",
    "n_timesteps": 64,
    "n_steps": 32,
    "batch_size": 32,
    "n_epochs": 1,
    "env_kwargs": {"g": 5.0},
    "env_wrapper": {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 8}},
}
COMMANDS = (
    "enjoy --no-render -n 9 --device cpu",
    "report --episodes 2 --no-video --device cpu",
    "record_video -n 2",
    "push_to_hub -orga someone --no-render --device cpu",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "settings.yml").write_text(yaml.safe_dump({"Pendulum-v1": SETTINGS}))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        command = "train --env Pendulum-v1 --conf-file settings.yml --eval-freq -1 --device cpu --verbose 0 --seed 1"
        assert main([*command.split(), "--checkpoint-freq", "32"]) == 0
    return folder


@pytest.fixture
def run(in_trained: Path) -> Path:
    """A copy of the run, in the working folder."""
    return RUN


class Hub:
    """Accepts an upload without sending it."""

    def create_repo(self, **kwargs: Any) -> str:
        return "the repository's address"

    def snapshot_download(self, local_dir: Path, **kwargs: Any) -> None:
        local_dir.mkdir(parents=True)

    def upload_folder(self, **kwargs: Any) -> None:
        pass


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, Any]]]:
    """Gravity and time limit of the environments that were built."""
    import rl_zoo3.enjoy
    import rl_zoo3.utils

    found = []
    create = rl_zoo3.utils.create_test_env

    def spy(*args: Any, **kwargs: Any) -> Any:
        env = create(*args, **kwargs)
        found.append((env.get_attr("g")[0], env.env_is_wrapped(TimeLimit)[0] and env.get_attr("_max_episode_steps")[0]))
        return env

    for module in (rl_zoo3, rl_zoo3.utils, rl_zoo3.enjoy):
        monkeypatch.setattr(module, "create_test_env", spy)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    yield found


def _run(command: str) -> int:
    return main([*command.split(), "--env", "Pendulum-v1"])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_build_the_environment_of_the_settings(command: str, run: Path, seen: list[tuple[Any, Any]]) -> None:
    assert _run(command) == 0
    assert seen == [(5.0, 8)]


def test_the_command_line_takes_precedence_over_the_settings(run: Path, seen: list[tuple[Any, Any]]) -> None:
    for command in ("record_video -n 2", "enjoy --no-render -n 2 --device cpu"):
        assert _run(f"{command} --env-kwargs g:2.0") == 0
    assert seen == [(2.0, 8), (2.0, 8)]


def test_rewards_of_a_run_that_does_not_normalise_cannot_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("enjoy --no-render -n 9 --device cpu --norm-reward") == 2
    message = (
        "`--norm-reward` must be used with a run whose settings normalise, got one whose settings do not. Omit it."
    )
    assert message in capsys.readouterr().err.splitlines()[0]


def test_an_upload_holds_the_arguments_of_the_environment(run: Path, seen: list[tuple[Any, Any]]) -> None:
    assert _run(COMMANDS[-1]) == 0
    folder = Path("hub", "clipppo-Pendulum-v1")
    assert yaml.safe_load((folder / "env_kwargs.yml").read_text()) == {"g": 5.0}
    assert "# Environment Arguments" in (folder / "README.md").read_text()


@pytest.mark.parametrize("command", [*COMMANDS, "resume"])
def test_runs_with_null_keys_are_read(command: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    config = run / "Pendulum-v1" / "config.yml"
    null = dict.fromkeys(ZOO_KEYS - {"n_timesteps", "n_envs"})
    config.write_text(yaml.safe_dump({**SETTINGS, **null}))
    if command != "resume":
        assert _run(command) == 0
        return
    # Its checkpoints have the wrapper.
    config.write_text(yaml.safe_dump({**SETTINGS, **null, "env_wrapper": SETTINGS["env_wrapper"]}))
    (run / "Pendulum-v1.zip").unlink()
    assert main(["train", "--resume", str(run / "checkpoints" / "checkpoint_32.zip")]) == 0
    assert (run / "Pendulum-v1.zip").is_file()


def test_the_way_to_resume_starts_as_many_processes_and_quotes_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "my logs" / "clipppo" / "E-v0_1"
    for path in (run / "checkpoints" / "checkpoint_64.zip", run / "E-v0" / "args.yml"):
        path.parent.mkdir(parents=True)
        path.touch()
    (run / "E-v0" / "args.yml").write_text("n_processes: 2")
    command = f"torchrun --standalone --nproc-per-node 2 -m sb3_clipvf train --resume '{run}'"
    with own_models(), pytest.raises(ValueError, match=rf"loads one, and `{command}` ends the training\.$"):
        utils.get_model_path(1, str(tmp_path / "my logs"), "clipppo", EnvironmentName("E-v0"))


def test_damaged_options_do_not_mask_that_the_model_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "clipppo" / "E-v0_1"
    for path in (run / "checkpoints" / "checkpoint_64.zip", run / "E-v0" / "args.yml"):
        path.parent.mkdir(parents=True)
        path.touch()
    (run / "E-v0" / "args.yml").write_text("n_processes: [")
    with own_models(), pytest.raises(ValueError, match=r"No model found .* has those of the steps 64"):
        utils.get_model_path(1, str(tmp_path), "clipppo", EnvironmentName("E-v0"))


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({}, "E-v0.zip"),
        ({"load_best": True}, "best_model.zip"),
        ({"load_checkpoint": 512}, "rl_model_512_steps.zip"),
        ({"load_checkpoint": 512}, "checkpoints/checkpoint_512.zip"),
        ({"load_last_checkpoint": True}, "checkpoints/checkpoint_9.zip"),
    ],
)
def test_options_select_the_model_file(options: dict[str, object], file: str, tmp_path: Path) -> None:
    others = ["0.monitor.csv", "checkpoints/nothing", *(["E-v0.zip"] if options else [])]
    for path in (f"E-v0_1/{file}", *(f"E-v0_2/{name}" for name in others)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    asked_for = has_model("E-v0", Namespace(**{"load_checkpoint": None, **options}))
    assert choose_run(tmp_path, "E-v0", 0, asked_for) == 1
