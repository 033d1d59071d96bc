"""``sb3-clipvf report``: its figure, video, files and output."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from imageio_ffmpeg import get_ffmpeg_exe
from matplotlib.figure import Figure

from sb3_clipvf import zoo
from sb3_clipvf.zoo import report
from sb3_clipvf.zoo.report import main, next_commands, record_video, write_learning_curve
from sb3_clipvf.zoo.runs import Evaluation, Run, find_run, read_arguments
from sb3_clipvf.zoo.training_curve import TrainingCurve

EVALUATION = Evaluation((9.0, 11.0), (5, 5), True, 1000, 0)


class Scripted(gym.Env[np.ndarray, int]):
    """Five steps with one reward each; its rendering is a plain picture of an odd size."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.count += 1
        return np.zeros(1, dtype=np.float32), 1.0, self.count == 5, False, {}

    def render(self) -> np.ndarray:
        # Brightness encodes the step: the video must begin at the reset and hold each step once.
        return np.full((33, 47, 3), 50 * self.count, dtype=np.uint8)


class Endless(Scripted):
    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(1, dtype=np.float32), 1.0, False, False, {}


class Blind(Scripted):
    metadata = {"render_modes": ["human"]}


class Broken(Scripted):
    def render(self) -> np.ndarray:
        raise AttributeError("no OpenGL")


@pytest.fixture(autouse=True)
def _environments() -> Any:
    classes = (Scripted, Endless, Blind, Broken)
    for cls in classes:
        gym.register(f"{cls.__name__}-v0", entry_point=cls)
    yield
    for cls in classes:
        del gym.registry[f"{cls.__name__}-v0"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run without a model and without settings."""
    return Run("clipppo", "Scripted-v0", tmp_path, tmp_path / "Scripted-v0.zip")


def train(folder: Path, env_id: str) -> Run:
    # Endless episodes would make an evaluation endless too.
    evaluations = "-1" if env_id == "Endless-v0" else "32"
    options = (
        f"train --env {env_id} -n 64 --eval-freq {evaluations} --eval-episodes 2 --device cpu --verbose 0 --seed 1"
    )
    params = ("n_envs:2", "n_steps:16", "batch_size:16", "n_epochs:1")
    assert zoo.main([*options.split(), "-f", str(folder), "-params", *params]) == 0
    return find_run(folder, env_id)


def curve_of(*rows: tuple[float, float]) -> TrainingCurve:
    steps, returns = np.array(rows).reshape(-1, 2).T
    return TrainingCurve(steps, returns, steps / 100)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Saved figures."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def save(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


# --- learning curve


def test_figure_holds_the_numbers_with_names_and_units(run: Run, tmp_path: Path, figures: list[Figure]) -> None:
    np.savez(tmp_path / "evaluations.npz", timesteps=[500, 1000], results=[[1.0, 3.0], [8.0, 12.0]])
    # Two environments end episodes at the same steps: one point of the mean each.
    write_learning_curve(run, curve_of((400, 1.0), (400, 3.0), (800, 4.0), (800, 8.0)), EVALUATION, tmp_path / "c.png")
    (axes,) = figures[0].axes
    lines = {str(line.get_label()): line for line in axes.lines}
    mean = lines["mean of the last 100 of them"]
    np.testing.assert_allclose(mean.get_xdata(), [400, 800])
    np.testing.assert_allclose(mean.get_ydata(), [2, 4])
    evaluations = lines["evaluations during training,\n2 episodes each (band: one std)"]
    np.testing.assert_allclose(evaluations.get_xdata(), [500, 1000])
    np.testing.assert_allclose(evaluations.get_ydata(), [2, 10])
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [(400, 1), (400, 3), (800, 4), (800, 8)])
    assert axes.get_xlabel() == "training (environment steps)"
    assert axes.get_ylabel() == "return of an episode (sum of rewards)"
    assert axes.get_title() == f"{tmp_path.name} (clipppo), 1,000 steps of training"
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert "training episodes" in texts
    assert "trained agent, 2 episodes, deterministic:\n10.0 ± 1.0 (one std)" in texts
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_figure_replaces_an_older_one_only_when_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: Figure, file: Any, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError(28, "planted")

    (tmp_path / "c.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", save)
    with pytest.raises(OSError, match=r"c\.png could not be written: planted"):
        write_learning_curve(run, curve_of((400, 1.0)), EVALUATION, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() == b"old"


def test_figure_notes_that_no_training_episode_ended(run: Run, tmp_path: Path, figures: list[Figure]) -> None:
    write_learning_curve(run, curve_of(), EVALUATION, tmp_path / "c.png")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["no training episode ended"]


# --- video


def read_video(path: Path) -> np.ndarray:
    """Return the frames that ffmpeg decodes; 33 rows and 47 columns were made even for players."""
    command = [get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, 34, 48, 3)


def test_video_shows_each_step_of_one_episode_once(tmp_path: Path) -> None:
    run = train(tmp_path / "logs", "Scripted-v0")
    path = tmp_path / "videos" / "new" / "v.mp4"
    assert record_video(run, path, True, 0, "cpu") == "one episode, return 5.0, 5 steps"
    frames = read_video(path)
    assert len(frames) == 5
    # Compression changes the brightness 0, 50, 100, ... by a few steps of 255.
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [0, 50, 100, 150, 200], atol=8)
    assert os.listdir(path.parent) == ["v.mp4"]


def test_video_of_an_episode_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_VIDEO_STEPS", 7)
    text = record_video(train(tmp_path, "Endless-v0"), tmp_path / "v.mp4", True, 0, "cpu")
    assert text == "the first 7 steps of an episode"
    assert len(read_video(tmp_path / "v.mp4")) == 7


@pytest.mark.parametrize(
    "env_id, text",
    [
        ("Blind-v0", "skipped: Blind-v0 has no rgb_array rendering (its modes: human)"),
        ("Broken-v0", "skipped: Broken-v0 could not be rendered (AttributeError: no OpenGL)"),
    ],
)
def test_video_is_skipped_with_the_reason(tmp_path: Path, env_id: str, text: str) -> None:
    run = Run("clipppo", env_id, tmp_path / "run", tmp_path / "none.zip")
    assert record_video(run, tmp_path / "videos" / "v.mp4", True, 0) == text
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize("fails", ["reset", "render"])
def test_video_closes_its_environments(run: Run, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    made, closed = [], []
    make, close = Scripted.__init__, Scripted.close
    monkeypatch.setattr(Scripted, "__init__", lambda self, **kwargs: made.append(self) or make(self, **kwargs))
    monkeypatch.setattr(Scripted, "close", lambda self: closed.append(self) or close(self))
    monkeypatch.setattr(Scripted, fails, lambda self, **kwargs: 1 / 0)
    text = record_video(run, run.folder / "v.mp4", True, 0, "cpu")
    assert "could not be rendered (ZeroDivisionError" in text
    assert len(made) >= 2 and {id(env) for env in made} == {id(env) for env in closed}


def test_video_without_its_package_is_skipped(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert record_video(run, tmp_path / "v.mp4", True, 0) == (
        "skipped: the package moviepy is not installed (`pip install moviepy`)"
    )


@pytest.mark.parametrize("display, drivers", [(None, ("dummy", "egl")), (":0", (None, None))])
def test_video_opens_no_window_without_a_display(
    run: Run, monkeypatch: pytest.MonkeyPatch, display: str | None, drivers: tuple[str | None, str | None]
) -> None:
    names = ("SDL_VIDEODRIVER", "MUJOCO_GL")
    for name in (*names, "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if display is not None:
        monkeypatch.setenv("DISPLAY", display)
    seen = []

    def render(self: Broken) -> np.ndarray:
        seen.append(tuple(os.environ.get(name) for name in names))
        raise RuntimeError("seen")

    monkeypatch.setattr(Scripted, "render", render)
    assert "RuntimeError: seen" in record_video(run, run.folder / "v.mp4", True, 0)
    assert seen == [drivers]
    assert not any(name in os.environ for name in names)


# --- command


@pytest.fixture
def plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Plotly by a short text."""
    module = ModuleType("plotly.offline")
    module.get_plotlyjs = lambda: ""  # type: ignore[attr-defined]
    for name, found in (("plotly", ModuleType("plotly")), ("plotly.offline", module)):
        found.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, found)


@pytest.mark.usefixtures("plotly")
def test_command_writes_and_prints_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "my logs"
    run = train(logs, "Scripted-v0")
    capsys.readouterr()
    argv = ["report", "--env", "Scripted-v0", "-f", str(logs), "--episodes", "3", "--device", "cpu"]
    assert zoo.main(argv) == 0
    printed = capsys.readouterr().out
    assert "mean return     5.00 +/- 0.00 (std of 3 episodes, 5.00 to 5.00; most probable actions)" in printed
    assert "training        64 steps, about " in printed
    for name in ("learning_curve.png", "videos/Scripted-v0.mp4", "report.json", "report.html"):
        assert (run.folder / name).is_file()
        assert str(run.folder / name) in printed
    assert printed.index("Try next:") > printed.index("report.json")
    assert f"sb3-clipvf enjoy --env Scripted-v0 -f '{logs}' --exp-id 1" in printed
    numbers = json.loads((run.folder / "report.json").read_text())
    assert numbers["returns"] == [5.0, 5.0, 5.0]
    assert {name: numbers[name] for name in ("env", "algo", "mean_return", "std_return", "num_timesteps")} == {
        "env": "Scripted-v0",
        "algo": "clipppo",
        "mean_return": 5.0,
        "std_return": 0.0,
        "num_timesteps": 64,
    }
    assert numbers["files"] == {
        "learning_curve": str(run.folder / "learning_curve.png"),
        "video": str(run.folder / "videos" / "Scripted-v0.mp4"),
    }


def test_the_page_is_skipped_without_its_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No episode of its training has ended: the page has only what the evaluation found.
    run = train(tmp_path, "Scripted-v0")
    for path in (*run.folder.glob("*.monitor.csv"), run.folder / "evaluations.npz", run.folder / "progress.json"):
        path.unlink()
    argv = f"--env Scripted-v0 -f {tmp_path} --episodes 1 --no-video --device cpu".split()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else find_spec(name))
    assert main(argv) == 0
    assert "page            skipped: the package plotly is not installed" in capsys.readouterr().out
    assert main([*argv, "-o", str(tmp_path / "table.md")]) == 0
    assert "| Scripted-v0 | clipppo | 1 | 5 | 64 |" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("plotly")
def test_command_takes_the_best_model_without_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "Scripted-v0")
    argv = f"--env Scripted-v0 -f {tmp_path} --episodes 1 --load-best --no-video --stochastic --device cpu".split()
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "video           skipped: --no-video" in printed
    assert "sampled actions" in printed
    assert "training        32 of 64 steps, all of them in about " in printed
    numbers = json.loads((run.folder / "report.json").read_text())
    assert numbers["model"] == str(run.folder / "best_model.zip")
    assert numbers["num_timesteps"] == 32
    # The last episodes of the training ended at step 60 of 64.
    assert numbers["steps_per_second"] * numbers["training_seconds"] == pytest.approx(60)
    assert list(numbers["files"]) == ["learning_curve"]
    assert not (run.folder / "videos").exists()
    (run.folder / "Scripted-v0.zip").unlink()
    assert main(argv) == 0
    assert "training        32 steps, of a run that did not end\n" in capsys.readouterr().out
    # The page of the run has its number.
    assert main([*argv, "-o", str(tmp_path / "table.md")]) == 0
    assert "Best model, sampled" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("plotly")
def test_damaged_evaluations_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "Scripted-v0")
    path = run.folder / "evaluations.npz"
    path.write_bytes(path.read_bytes()[:300])
    assert main(f"--env Scripted-v0 -f {tmp_path} --episodes 1 --no-video --device cpu".split()) == 0
    assert f"left out        {path} must hold evaluations of SB3's EvalCallback" in capsys.readouterr().out


def test_an_error_of_the_figure_loses_no_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path, "Scripted-v0")
    monkeypatch.setattr(report, "write_learning_curve", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(f"--env Scripted-v0 -f {tmp_path} --episodes 1 --no-video --device cpu".split())
    assert json.loads((run.folder / "report.json").read_text())["returns"] == [5.0]


@pytest.mark.usefixtures("plotly")
def test_the_speed_is_that_of_all_processes(tmp_path: Path) -> None:
    run = train(tmp_path, "Scripted-v0")
    # As if each of two processes had had one environment: only the first one keeps files.
    (run.folder / "1.monitor.csv").unlink()
    (run.settings_folder / "args.yml").write_text(yaml.dump({**read_arguments(run), "n_processes": 2}))
    assert main(f"--env Scripted-v0 -f {tmp_path} --episodes 1 --no-video --device cpu".split()) == 0
    numbers = json.loads((run.folder / "report.json").read_text())
    assert numbers["steps_per_second"] * numbers["training_seconds"] == pytest.approx(60)


@pytest.mark.usefixtures("plotly")
@pytest.mark.parametrize("clock", ["model", "log"])
def test_time_of_a_resumed_training_is_not_known(
    tmp_path: Path, clock: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, "Scripted-v0")
    if clock == "model":
        # The best model is of the time before: it does not know of the resume.
        with zipfile.ZipFile(run.model_path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        entries["data"] = json.dumps({**json.loads(entries["data"]), "_num_timesteps_at_start": 48}).encode()
        with zipfile.ZipFile(run.model_path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    else:
        run.model_path.unlink()
        with (run.folder / "progress.json").open("a") as file:
            for step, seconds in ((65, 9.0), (66, 0.0)):
                file.write(json.dumps({"time/total_timesteps": step, "time/time_elapsed": seconds, "n": 1}) + "\n")
    capsys.readouterr()
    argv = f"--env Scripted-v0 -f {tmp_path} --episodes 1 --no-video --device cpu --load-best"
    assert main(argv.split()) == 0
    printed = capsys.readouterr().out
    if clock == "model":
        assert "training        32 of 64 steps, time not known\n" in printed
    else:
        assert "training        32 steps, of a run that did not end\n" in printed
    numbers = json.loads((run.folder / "report.json").read_text())
    assert (numbers["training_seconds"], numbers["steps_per_second"]) == (None, None)


@pytest.mark.usefixtures("plotly")
def test_monitor_files_that_are_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "Scripted-v0")
    (run.folder / "0.monitor.csv").write_text("")
    assert main(f"--env Scripted-v0 -f {tmp_path} --episodes 1 --no-video --device cpu".split()) == 0
    assert f"left out        {run.folder}/0.monitor.csv must begin with the header" in capsys.readouterr().out


def test_proposals_name_the_run_and_the_algorithm(run: Run, tmp_path: Path) -> None:
    commands = [
        command for _, command in next_commands(Run("ppo", "Acrobot-v1", Path("a/Acrobot-v1_12"), run.model_path), "a")
    ]
    assert commands == [
        "sb3-clipvf enjoy --algo ppo --env Acrobot-v1 -f a --exp-id 12",
        "sb3-clipvf train --env Acrobot-v1 -f a -P",
        "sb3-clipvf train --algo ppo --env Pendulum-v1 -f a -P",
    ]
    commands = [command for _, command in next_commands(Run("clipppo", "E-v0", Path("a/E-v0_1"), run.model_path), "a")]
    assert commands[1:] == [
        "sb3-clipvf train --env E-v0 -f a -P -params clip_range:None kl_coef:1.0 adaptive_kl_target:0.01",
        "sb3-clipvf train --env Acrobot-v1 -f a -P",
    ]


def test_proposals_make_the_environment_of_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "E-v0_1_0b0c7c1e-5a52-4a51-8c3e-111111111111"
    settings = folder / "E-v0" / "args.yml"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        "gym_packages: [json, --conf-file=/d/evil.py, xml.dom]\n"
        'env_kwargs: {g: 5.0, name: a b, "a:print(1)#": 1}\neval_env_kwargs: {g: 9.8}\n'
        "conf_file: my.yml\nn_processes: 2\n"
    )
    watch, variant, _ = (command for _, command in next_commands(Run("clipppo", "E-v0", folder, folder / "x.zip"), "a"))
    assert watch == "sb3-clipvf enjoy --env E-v0 -f a --exp-id 1_0b0c7c1e-5a52-4a51-8c3e-111111111111"
    train = "torchrun --standalone --nproc-per-node 2 -m sb3_clipvf train --env E-v0 -f a"
    options = "--gym-packages json xml.dom --env-kwargs g:5.0 'name:'\"'\"'a b'\"'\"'' --eval-env-kwargs g:9.8"
    assert variant.startswith(f"{train} {options} --conf-file my.yml -P -params clip_range:None ")


@pytest.mark.parametrize(
    ("config", "is_named"),
    [
        ("logs/clipppo/E-v0_1/own.py", False),
        ("logs/clipppo/E-v0_1/../../own.yml", False),
        ("{}/logs/own.py", False),
        ("logs.own", False),
        ("own.py", True),
        ("{}/own.yml", True),
        ("own", True),
    ],
)
def test_proposals_name_no_settings_of_the_log_folder(
    config: str, is_named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder, config = Path("logs/clipppo/E-v0_1"), config.format(tmp_path)
    (folder / "E-v0").mkdir(parents=True)
    (folder / "E-v0" / "args.yml").write_text(f"conf_file: {config}\n")
    for path in ("own.py", "logs/own.py"):
        Path(path).touch()
    _, (_, variant), _ = next_commands(Run("clipppo", "E-v0", folder, folder / "E-v0.zip"), "logs")
    assert (f" --conf-file {config} " in variant) == ("--conf-file" in variant) == is_named


@pytest.mark.parametrize(
    "options, match",
    [
        ("--episodes 0", r"`--episodes` must be a whole number of at least 1, got 0\."),
        ("--seed -1", r"`--seed` must be a whole number in \[0, 4294967295\], got -1\."),
        ("--n-envs -2", r"`--n-envs` must be a whole number of at least 1, got -2\."),
        ("--algo ppo --device gpu", "`device` must be 'auto' or a PyTorch device, got 'gpu'"),
        ("--env Acrobot-v1", r"There is no run of Acrobot-v1 in"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, options: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        main(["-f", str(tmp_path), *options.split()])


def test_actions_cannot_be_both_sampled_and_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--deterministic", "--stochastic"])
    assert "not allowed with argument --deterministic" in capsys.readouterr().err
