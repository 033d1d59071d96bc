"""Process state and errors of the console command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gymnasium.error import DependencyNotInstalled
from rl_zoo3.utils import get_class_by_name

from sb3_clipvf.common.validation import check_folder
from sb3_clipvf.schedules import make_schedule
from sb3_clipvf.zoo.process import (
    explain,
    ffmpeg_on_path,
    has_display,
    own_command,
    own_subprocesses,
    patched_argv,
    patched_environment,
)


@pytest.mark.parametrize(
    ("command", "sub_command"),
    [
        (["python", "enjoy.py", "-n", "5"], "enjoy"),
        (["python", "-m", "rl_zoo3.record_video", "-n", "5"], "record_video"),
    ],
)
def test_the_zoos_subprocesses_become_ours(command: list[str], sub_command: str) -> None:
    assert own_command(command) == [sys.executable, "-m", "sb3_clipvf", sub_command, "-n", "5"]


def test_other_subprocesses_stay() -> None:
    assert own_command(["ls", "enjoy.py"]) == ["ls", "enjoy.py"]
    assert own_command("python enjoy.py") == "python enjoy.py"


def test_subprocess_call_is_replaced_for_a_while() -> None:
    call = subprocess.call
    with pytest.raises(KeyError, match="inside"), own_subprocesses():
        assert subprocess.call is not call
        assert subprocess.call([sys.executable, "-c", "raise SystemExit(3)"]) == 3
        raise KeyError("inside")
    assert subprocess.call is call


def test_argv_is_replaced_for_a_while() -> None:
    before = sys.argv
    with pytest.raises(KeyError, match="inside"), patched_argv(["name", "-n"]):
        assert sys.argv == ["name", "-n"]
        raise KeyError("inside")
    assert sys.argv is before


def test_environment_variables_are_set_only_where_the_user_set_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "svg")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with patched_environment({"MPLBACKEND": "Agg", "MUJOCO_GL": "egl"}):
        assert (os.environ["MPLBACKEND"], os.environ["MUJOCO_GL"]) == ("svg", "egl")
    assert os.environ["MPLBACKEND"] == "svg"
    assert "MUJOCO_GL" not in os.environ


def test_display_is_looked_for_on_linux_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert has_display()
    monkeypatch.delenv("WAYLAND_DISPLAY")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert has_display()


def test_ffmpeg_is_offered_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with ffmpeg_on_path():
        done = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ffmpeg version")
    assert os.environ["PATH"] == str(tmp_path)


def test_the_users_ffmpeg_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ffmpeg").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with ffmpeg_on_path():
        assert os.environ["PATH"] == str(tmp_path)


def _raised(function: object, *args: object) -> Exception:
    try:
        function(*args)  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_errors_about_input_are_told_from_faults() -> None:
    assert explain(_raised(make_schedule, "linear", "clip_range")) == str(
        _raised(make_schedule, "linear", "clip_range")
    )
    # Raised by Python's own library and by this test: no one knows whether it is about input.
    assert explain(_raised(int, "x")) is None
    assert explain(_raised(Path("/nowhere/at/all").read_text)) is None
    assert explain(RuntimeError("CUDA")) is None


def test_errors_that_pythons_library_raises_for_a_checker_are_of_input(tmp_path: Path) -> None:
    message = explain(_raised(get_class_by_name, "not_there.Wrapper"))
    assert message == "No module named 'not_there'"
    message = explain(_raised(check_folder, "--log-folder", "/proc/logs", "Name another one."))
    assert message is not None
    assert message.startswith("`--log-folder` must be a folder")  # without the number of the error


def test_an_error_of_a_training_that_had_begun_is_none_of_input() -> None:
    error = _raised(make_schedule, "linear", "clip_range")
    assert explain(error) is not None
    error.add_note("The training ended at num_timesteps=64 of 128.")
    assert explain(error) is None


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
    message = explain(error)
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
    assert explain(ValueError(text)) is None


def test_a_package_that_is_there_is_not_called_missing() -> None:
    # Raised here, so neither a missing package nor an error that the Zoo or Gymnasium raised.
    assert explain(ValueError("CartPole-v9 not found in gym registry")) is None
