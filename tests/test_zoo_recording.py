"""``record_training``: what it records, what it keeps, and that its video exists at the end."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from sb3_clipvf.zoo import main

RUN = Path("logs", "clipppo", "E-v0_1")
VIDEOS = RUN / "videos"


@pytest.fixture(autouse=True)
def _run(in_empty_folder: Path) -> None:
    """A run with models of all kinds, of which the command reads only the names."""
    for name in ("E-v0.zip", "best_model.zip", "rl_model_30_steps.zip", "checkpoints/checkpoint_4.zip"):
        (RUN / name).parent.mkdir(parents=True, exist_ok=True)
        (RUN / name).touch()
    (RUN / "checkpoints" / "checkpoint_30.zip").touch()
    VIDEOS.mkdir()
    (VIDEOS / "E-v0.mp4").write_text("of the report")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of the commands that record one model; each writes a short video."""
    commands: list[str] = []
    call = subprocess.call

    def record(command: Any, **kwargs: Any) -> int:
        if "record_video" not in command:
            return call(command, **kwargs)  # imageio_ffmpeg looks for ffmpeg
        commands.append(" ".join(command[3:]))
        model = command[-1] if "--load-checkpoint" in command else command[-1].removeprefix("--")
        names = {"load-best": "best-model-E-v0", "30": "checkpoint-30-E-v0", "4": "checkpoint-4-E-v0"}
        target = Path(command[command.index("-o") + 1], f"{names.get(model, 'final-model-E-v0')}.mp4")
        write = [
            get_ffmpeg_exe(),
            "-loglevel",
            "error",
            "-f",
            "lavfi",
            "-i",
            "testsrc=d=0.2:s=320x64:r=10",
            str(target),
        ]
        return subprocess.run(write, check=True).returncode

    monkeypatch.setattr(subprocess, "call", record)
    return commands


def _record(options: str = "") -> int:
    return main(["record_training", "--env", "E-v0", *options.split()])


def _refused(options: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert _record(options) == 2
    line, hint = capfd.readouterr().err.splitlines()[-2:]
    assert hint == "(Set SB3_CLIPVF_TRACEBACK=1 to see the traceback.)"
    return line


def test_all_models_are_recorded_once_and_earlier_videos_stay(recorded: list[str]) -> None:
    for number in (1, 2):
        assert _record("-n 5") == 0
        folder = VIDEOS / f"training_{number}"
        assert all(f"-o {folder.absolute()} " in command for command in recorded)
        models = [command.partition("--no-render")[2].strip() for command in recorded]
        assert models == ["", "--load-best", "--load-checkpoint 4", "--load-checkpoint 30"]
        assert len(list(folder.glob("*-E-v0.mp4"))) == 4
        assert (folder / "training.mp4").stat().st_size > 0
        recorded.clear()
    assert (VIDEOS / "E-v0.mp4").read_text() == "of the report"


def test_a_folder_without_numbers_of_runs_is_recorded(recorded: list[str]) -> None:
    for path in RUN.iterdir():
        path.rename(RUN.parent / path.name)
    assert _record("--exp-id -1") == 0
    assert len(recorded) == 4
    assert (RUN.parent / "videos" / "training_1" / "training.mp4").is_file()


def test_actions_are_deterministic_only_if_asked_for(recorded: list[str]) -> None:
    assert _record("--deterministic") == 0
    assert all("--deterministic" in command for command in recorded)


def test_a_relative_folder_that_is_new_or_empty_is_recorded_into(recorded: list[str]) -> None:
    Path("empty").mkdir()
    for folder in ("new/one", "empty"):
        assert _record(f"-o {folder} --gif") == 0
        assert Path(folder, "training.mp4").is_file()
        assert Path(folder, "training.gif").is_file()


def test_a_folder_with_files_is_refused(recorded: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine", "thesis.tex").touch()
    message = _refused("-o mine", capfd)
    assert "`--output-folder` must be a new or an empty folder" in message
    assert "got 'mine', which has files. Pass another one, or omit it." in message
    assert Path("mine", "thesis.tex").is_file()
    assert recorded == []


def test_a_folder_that_the_shell_would_split_is_refused(
    recorded: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    RUN.parents[1].rename("my logs")
    assert main(["record_training", "--env", "E-v0", "-f", "my logs"]) == 2
    assert f"the shell, got '{tmp_path / 'my logs'}" in capfd.readouterr().err.splitlines()[0]
    assert recorded == []


def test_letters_of_all_languages_and_tildes_are_legal(recorded: list[str]) -> None:
    assert _record("-o Jörg/研究/~1") == 0
    assert Path("Jörg/研究/~1/training.mp4").is_file()


def test_a_run_without_models_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    (RUN.parent / "Empty-v0_1").mkdir()
    message = _refused("--env Empty-v0", capfd)
    assert (
        "`--env` must be an environment whose run has a model, got Empty-v0 with none in logs/clipppo/Empty" in message
    )


@pytest.mark.parametrize("writes", [True, False])
def test_a_video_that_ffmpeg_cannot_write_is_an_error(
    writes: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def record(command: list[str]) -> int:
        if writes:
            Path(command[command.index("-o") + 1], "final-model-E-v0.mp4").write_text("no video")
        return 0

    monkeypatch.setattr(subprocess, "call", record)
    message = _refused("", capfd)
    assert "ffmpeg has not written /" in message
    assert f"{VIDEOS / 'training_1'} has the videos" in message
