"""Process state of the console command: subprocesses, environment variables, display, ffmpeg."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_clipvf import distributed
from sb3_clipvf.distributed import Group
from sb3_clipvf.zoo.process import (
    ffmpeg_on_path,
    has_display,
    one_output,
    patched_environment,
    redirected,
    redirected_calls,
)


@pytest.mark.parametrize(
    ("command", "sub_command"),
    [
        (["python", "enjoy.py", "-n", "5"], "enjoy"),
        (["python", "-m", "rl_zoo3.record_video", "-n", "5"], "record_video"),
    ],
)
def test_the_zoos_subprocesses_become_ours(command: list[str], sub_command: str) -> None:
    assert redirected(command) == [sys.executable, "-m", "sb3_clipvf", sub_command, "-n", "5"]


def test_other_subprocesses_do_not_change() -> None:
    assert redirected(["ls", "enjoy.py"]) == ["ls", "enjoy.py"]
    assert redirected("python enjoy.py") == "python enjoy.py"


def test_subprocess_call_is_replaced_for_a_while() -> None:
    call = subprocess.call
    with pytest.raises(KeyError, match="inside"), redirected_calls():
        assert subprocess.call is not call
        assert subprocess.call([sys.executable, "-c", "raise SystemExit(3)"]) == 3
        raise KeyError("inside")
    assert subprocess.call is call


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


def test_a_packaged_ffmpeg_is_used_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with ffmpeg_on_path():
        done = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ffmpeg version")
    assert os.environ["PATH"] == str(tmp_path)


def test_the_users_ffmpeg_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ffmpeg").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with ffmpeg_on_path():
        assert os.environ["PATH"] == str(tmp_path)


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        monkeypatch.setattr(distributed, "current_group", lambda rank=rank: Group(rank, 2))
        with one_output():
            sys.stdout.write(f"process {rank}\n")
    assert capsys.readouterr().out == "process 0\n"
