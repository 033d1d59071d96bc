"""Errors of input, in one line, and faults."""

import sys
from pathlib import Path

import pytest
from gymnasium.error import DependencyNotInstalled
from rl_zoo3.utils import get_class_by_name

from sb3_clipvf.common.validation import ensure_writable_folder
from sb3_clipvf.schedules import make_schedule
from sb3_clipvf.zoo.errors import input_error


def _raised(function: object, *args: object) -> Exception:
    try:
        function(*args)  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_errors_of_input_are_distinguished_from_faults() -> None:
    assert input_error(_raised(make_schedule, "linear", "clip_range")) == str(
        _raised(make_schedule, "linear", "clip_range")
    )
    # Raised by the standard library and by this test: neither checks input.
    assert input_error(_raised(int, "x")) is None
    assert input_error(_raised(Path("/nowhere/at/all").read_text)) is None
    assert input_error(RuntimeError("CUDA")) is None


def test_errors_that_pythons_library_raises_for_a_checker_are_of_input(tmp_path: Path) -> None:
    message = input_error(_raised(get_class_by_name, "not_there.Wrapper"))
    assert message == "No module named 'not_there'"
    message = input_error(_raised(ensure_writable_folder, "--log-folder", "/proc/logs", "Name another one."))
    assert message is not None
    assert message.startswith("`--log-folder` must be a folder")  # without the number of the error


def test_an_error_of_a_training_that_has_begun_is_a_fault() -> None:
    error = _raised(make_schedule, "linear", "clip_range")
    assert input_error(error) is not None
    error.add_note("The training ended at num_timesteps=64 of 128.")
    assert input_error(error) is None


@pytest.mark.parametrize(
    ("package", "error", "requirement"),
    [
        ("Box2D", DependencyNotInstalled("Box2D is not installed, you can install it by run ..."), "sb3_clipvf[box2d]"),
        ("mujoco", DependencyNotInstalled("MuJoCo is not installed, run ..."), "sb3_clipvf[mujoco]"),
        ("ale_py", ValueError("ALE/Pong-v5 not found in gym registry, you maybe meant X?"), "sb3_clipvf[atari]"),
        ("ale_py", KeyError("PongNoFrameskip-v4"), "sb3_clipvf[atari]"),
        ("wandb", ImportError("please install W&B via `pip install wandb`"), "sb3_clipvf[tracking]"),
        ("minigrid", ValueError("MiniGrid-Unlock-v0 not found in gym registry"), "sb3_clipvf[minigrid]"),
        ("pybullet_envs_gymnasium", ValueError("AntBulletEnv-v0 not found in gym registry"), "sb3_clipvf[pybullet]"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, error: Exception, requirement: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = input_error(error)
    assert message is not None
    assert f"the package {package} must be installed" in message
    assert f"pip install '{requirement}'" in message
    assert str(error) in message


@pytest.mark.parametrize(
    "text", ["`--vec-env` must be one of dummy, envpool, got 'foo'", "--sampler wandb", "minigrid"]
)
def test_an_error_of_value_that_mentions_a_package_is_not_about_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for package in ("envpool", "wandb", "minigrid"):
        monkeypatch.setitem(sys.modules, package, None)
    assert input_error(ValueError(text)) is None


def test_an_installed_package_is_not_called_missing() -> None:
    # Raised here, so neither a missing package nor an error that the Zoo or Gymnasium raised.
    assert input_error(ValueError("CartPole-v9 not found in gym registry")) is None
