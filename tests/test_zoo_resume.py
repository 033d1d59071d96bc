"""``sb3-clipvf train --resume`` and ``enjoy`` of checkpoints: a killed run ends as one that was not interrupted."""

import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback

import sb3_clipvf
from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint import ResumableEnv, read_checkpoint, read_manifest
from sb3_clipvf.common.validation import check_int
from sb3_clipvf.distributed import Group
from sb3_clipvf.envs import FastDummyVecEnv
from sb3_clipvf.files.statistics import read_pickle
from sb3_clipvf.zoo import main
from sb3_clipvf.zoo.checked_files import RunLoader, read_settings
from sb3_clipvf.zoo.experiment import ClipPPOExperimentManager
from sb3_clipvf.zoo.resume import resumed_run
from sb3_clipvf.zoo.vec_env import make_vec_env

pytestmark = pytest.mark.usefixtures("in_empty_folder")

RUN = Path("logs") / "clipppo" / "CartPole-v1_1"
STEPS = 1280
SIGNAL = "SB3_CLIPVF_TEST_SIGNAL"
SETTINGS: dict[str, Any] = {
    "policy": "MlpPolicy",
    "n_timesteps": STEPS,
    "n_envs": 2,
    "n_steps": 32,
    "batch_size": 32,
    "n_epochs": 2,
    "learning_rate": "lin_0.01",
    "normalize": True,
    "callback": ["test_zoo_resume.Interrupt"],
}
TRAIN = (
    "train --env CartPole-v1 --conf-file settings.yml --seed 1 --device cpu --verbose 0 --num-threads 1 -tb tb "
    "--eval-freq 192 --eval-episodes 2 --checkpoint-freq 256 --save-freq 512"
)


class Interrupt(BaseCallback):
    """Kills its own process, or ends the training by an error."""

    def _on_step(self) -> bool:
        name, _, step = os.environ.get(SIGNAL, "").partition(":")
        if name and self.num_timesteps == int(step):
            if name == "FAULT":
                check_int("n_steps", 0, 1, "An error that would be one of input before the training.")
            os.kill(os.getpid(), getattr(signal, name))
        return True


def _train(folder: Path, *options: str, settings: dict[str, Any] | None = None) -> int:
    (folder / "settings.yml").write_text(yaml.safe_dump({"CartPole-v1": {**SETTINGS, **(settings or {})}}))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        return main([*TRAIN.split(), *options])


def _in_a_process(folder: Path, command: str, ended_by: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(Path(sb3_clipvf.__file__).parents[1]), str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, SIGNAL: ended_by}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "sb3_clipvf", *command.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _ended(folder: Path) -> dict[str, Any]:
    """Return the results of a run."""
    run = folder / RUN
    ended: dict[str, Any] = {}
    for name in ("CartPole-v1", "best_model"):
        model = ClipPPO.load(run / f"{name}.zip", device="cpu")
        ended[name] = [model.num_timesteps, *(value.tolist() for value in model.policy.state_dict().values())]
    with np.load(run / "evaluations.npz") as history:
        ended["evaluations"] = {name: history[name].tolist() for name in history.files}
    for path in sorted(run.glob("*.monitor.csv")):
        ended[path.name] = [row.split(",")[:2] for row in path.read_text().splitlines()[1:]]  # without the times
    for name in ("CartPole-v1/vecnormalize.pkl", "best_vecnormalize.pkl"):
        moments = [vars(getattr(read_pickle(run / name), rms)) for rms in ("obs_rms", "ret_rms")]
        ended[name] = [{key: np.asarray(value).tolist() for key, value in part.items()} for part in moments]
    ended["tensorboard"] = [path.name for path in (folder / "tb" / "CartPole-v1").iterdir()]
    ended["settings"] = [(run / "CartPole-v1" / name).read_text() for name in ("args.yml", "config.yml")]
    return ended


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert _train(folder) == 0
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, in the working folder."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return RUN


@pytest.fixture
def cut(run: Path) -> Path:
    """The same run, killed after its checkpoint at step 1024."""
    (run / "CartPole-v1.zip").unlink()
    (run / "checkpoints" / "checkpoint_1280.zip").unlink()
    return run


def resume(path: Path | str, *options: str) -> int:
    return main(["train", "--resume", str(path), *options])


# ---------------------------------------------------------------- resuming


def test_a_killed_run_resumes_to_the_end_of_the_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yml").write_text(yaml.safe_dump({"CartPole-v1": SETTINGS}))
    killed = _in_a_process(tmp_path, TRAIN, "SIGKILL:1000")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / RUN / "CartPole-v1.zip").exists()
    # It was evaluated at step 960, after its last checkpoint.
    assert read_manifest(newest(tmp_path / RUN)).num_timesteps == 768
    resumed = _in_a_process(tmp_path, f"train --resume {RUN} --verbose 1")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("at step 768 of 1280") == resumed.stdout.count("checkpoint_768") == 1
    assert _ended(tmp_path) == _ended(whole)


def test_a_terminated_run_resumes_to_the_end_of_the_uninterrupted_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SIGNAL, "SIGTERM:1000")
    assert _train(tmp_path) == 128 + signal.SIGTERM
    monkeypatch.delenv(SIGNAL)
    assert f"To resume: sb3-clipvf train --resume {RUN}" in capsys.readouterr().out
    assert not (tmp_path / RUN / "CartPole-v1.zip").exists()
    assert read_manifest(newest(tmp_path / RUN)).num_timesteps >= 768
    assert resume(RUN / "checkpoints") == 0
    assert _ended(tmp_path) == _ended(whole)


def test_a_signal_to_all_processes_ends_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = FastDummyVecEnv.close

    def close(self: Any) -> None:
        closed(self)
        raise BrokenPipeError("the process of this environment has ended, too")

    monkeypatch.setenv(SIGNAL, "SIGINT:80")
    monkeypatch.setattr(FastDummyVecEnv, "close", close)
    assert _train(tmp_path, "--eval-freq", "-1") == 128 + signal.SIGINT


@pytest.mark.parametrize(("step", "has_checkpoint"), [(300, True), (20, False)])
def test_a_failed_training_reports_its_notes_and_how_to_resume(
    step: int, has_checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = FastDummyVecEnv.close

    def close(self: Any) -> None:
        closed(self)
        raise BrokenPipeError("the process of this environment has ended, too")

    monkeypatch.setenv(SIGNAL, f"FAULT:{step}")
    monkeypatch.setattr(FastDummyVecEnv, "close", close)
    with pytest.raises(ValueError, match="`n_steps` must be a whole number") as raised:
        _train(tmp_path, "--eval-freq", "-1")
    assert f"The training ended at num_timesteps={step} of 1280" in raised.value.__notes__[-1]
    assert (f"To resume: sb3-clipvf train --resume {RUN}" in capsys.readouterr().out) is has_checkpoint


def test_the_hint_of_several_processes_is_their_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sb3_clipvf.zoo.experiment.current_group", lambda: Group(0, 2))
    monkeypatch.setenv(SIGNAL, "FAULT:300")
    with pytest.raises(ValueError, match="`n_steps` must be a whole number"):
        _train(tmp_path, "--eval-freq", "-1")
    assert (
        f"To resume: torchrun --standalone --nproc-per-node 2 -m sb3_clipvf train --resume {RUN}\n"
        in capsys.readouterr().out
    )


def test_a_run_keeps_how_many_processes_each_machine_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.zoo.experiment.current_group", lambda: Group(0, 4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert _train(tmp_path, "--eval-freq", "-1", "-n", "64") == 0
    args = read_settings(tmp_path / RUN / "CartPole-v1" / "args.yml")
    assert (args["n_processes"], args["n_processes_per_machine"]) == (4, 2)


@pytest.mark.parametrize(("began", "resumes"), [(1, 2), (2, 1), (4, 2)])
def test_another_number_of_processes_is_refused(
    cut: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], began: int, resumes: int
) -> None:
    settings = cut / "CartPole-v1" / "args.yml"
    settings.write_text(yaml.dump({**read_settings(settings), "n_processes": began}))
    monkeypatch.setattr("sb3_clipvf.zoo.options.current_group", lambda: Group(0, resumes))
    assert resume(cut) == 2
    launch = "sb3-clipvf" if began == 1 else f"torchrun --standalone --nproc-per-node {began} -m sb3_clipvf"
    error = capsys.readouterr().err
    assert (
        f"`--resume` must name a run of as many processes as resume it, {resumes}, got {cut.absolute()} of {began}."
        in error
    )
    assert f"Run `{launch} train --resume {cut.absolute()}`." in error


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("checkpoint_*.zip"), key=lambda path: read_manifest(path).serial)


def test_an_earlier_checkpoint_can_be_named(
    whole: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = _ended(whole)
    assert resume(run / "checkpoints" / "checkpoint_1024.zip", "--verbose", "1") == 0
    assert "at step 1024 of 1280" in capsys.readouterr().out
    assert _ended(tmp_path) == expected


@pytest.mark.parametrize(
    ("vec_env", "settings"),
    [
        ("dummy", {}),
        ("gymnasium", {}),
        ("dummy", {"env_wrapper": {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 9}}}),
        ("gymnasium", {"env_wrapper": {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 9}}}),
    ],
)
def test_the_environments_are_those_of_the_run(
    vec_env: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if episodes were too many to be in the checkpoint.
    monkeypatch.setattr("sb3_clipvf.checkpoint.monitor_files.LARGEST_FILE", 0)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        options = ("--vec-env", vec_env, "--eval-freq", "-1")
        assert _train(folder, *options, settings={**settings, "n_timesteps": 320}) == 0
    os.chdir(second)
    (RUN / "CartPole-v1.zip").unlink()
    assert resume(RUN / "checkpoints" / "checkpoint_256.zip") == 0
    for name in sorted(path.name for path in (first / RUN).glob("*.monitor.csv")):
        rows = [
            [row.split(",") for row in (folder / RUN / name).read_text().splitlines()[1:]] for folder in (first, second)
        ]
        rows = [[row[:2] + row[3:] for row in table] for table in rows]  # without the times
        assert rows[0] == rows[1]
        assert len(rows[0]) > 2
    models = [ClipPPO.load(folder / RUN / "CartPole-v1.zip", device="cpu") for folder in (first, second)]
    pairs = zip(*(model.policy.state_dict().values() for model in models), strict=True)
    assert all(th.equal(one, other) for one, other in pairs)


def test_files_of_episodes_are_kept_if_the_environments_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--vec-env", "gymnasium", "--eval-freq", "-1")
    assert _train(tmp_path, *options, settings={"n_timesteps": 320}) == 0
    before = (RUN / "0.monitor.csv").read_bytes()
    assert before.count(b"\n") > 3

    def failing(*args: Any) -> None:
        make_vec_env(*args).close()
        raise RuntimeError("no memory")

    monkeypatch.setattr("sb3_clipvf.zoo.experiment.make_vec_env", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        resume(RUN / "checkpoints" / "checkpoint_256.zip")
    assert (RUN / "0.monitor.csv").read_bytes() == before


@pytest.mark.parametrize("env_id", ["PandaReach-v3", "parking-v0"])
def test_monitors_have_the_arguments_that_the_zoo_adds(
    env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = gym.envs.registration.EnvSpec(env_id, entry_point="gymnasium.envs.classic_control:CartPoleEnv")
    monkeypatch.setitem(gym.registry, env_id, entry)
    monkeypatch.setattr(ClipPPOExperimentManager, "is_robotics_env", staticmethod(lambda name: "Panda" in name))
    manager = ClipPPOExperimentManager(Namespace(), "clipppo", env_id, "logs", device="cpu")
    manager.resumed, manager.save_path = SimpleNamespace(), str(tmp_path)  # type: ignore[assignment]
    rows = "#{}\nr,l,t,is_success\n1.0,1,1.0,True\n"
    (tmp_path / "0.monitor.csv").write_text(rows)
    env = manager.create_envs(1)
    assert env.get_attr("info_keywords") == [("is_success",)]
    env.close()
    assert (tmp_path / "0.monitor.csv").read_text() == rows


def test_states_of_environments_in_processes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipPPOExperimentManager, "checkpoint_freq", 10)
    managers = [
        ClipPPOExperimentManager(Namespace(), "clipppo", "CartPole-v1", "logs", vec_env_type=kind)
        for kind in ("subproc", "dummy")
    ]
    wrappers: list[Any] = []
    monkeypatch.setattr(ExperimentManager, "create_envs", lambda manager, *_: wrappers.append(manager.env_wrapper))
    for manager in managers:
        manager.create_envs(1)
    assert isinstance(wrappers[0](gym.make("CartPole-v1")), ResumableEnv)
    assert wrappers[1] is None


def test_a_complete_run_is_not_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert resume(run) == 0
    assert f"{run.resolve()} is complete, with 1280 steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("path", "options", "step", "total"),
    [("checkpoints/checkpoint_1024.zip", (), 1150, STEPS), ("", ("-n", "1600"), 1300, 1600)],
    ids=["rewound", "extended"],
)
def test_a_complete_run_that_was_continued_and_killed_is_not_complete(
    path: str, options: tuple[str, ...], step: int, total: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGNAL, f"SIGTERM:{step}")
    assert resume(run / path, *options) == 128 + signal.SIGTERM
    found, _ = resumed_run(str(run), [])
    assert (found.is_complete, found.total_timesteps) == (False, total)


def test_a_complete_run_with_a_damaged_checkpoint_is_complete(run: Path) -> None:
    newest(run).write_bytes(newest(run).read_bytes()[:1000])
    found, _ = resumed_run(str(run), [])
    assert (found.is_complete, found.num_timesteps) == (True, 1024)


def test_a_run_that_was_killed_while_it_saved_its_model_saves_it(whole: Path, run: Path, tmp_path: Path) -> None:
    expected = _ended(whole)
    model = run / "CartPole-v1.zip"
    model.write_bytes(model.read_bytes()[:1000])
    assert resume(run) == 0
    assert _ended(tmp_path) == expected


def test_a_complete_run_can_be_extended(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(run, "-n", "1.344e3", "--verbose", "1") == 0
    assert "The run now ends at step 1344; schedules still end at step 1280" in capsys.readouterr().out
    model = ClipPPO.load(run / "CartPole-v1.zip", device="cpu")
    assert model.num_timesteps == 1344
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.0
    assert resume(run) == 0
    assert "is complete, with 1344 steps" in capsys.readouterr().out


def test_options_of_the_process_may_differ(cut: Path) -> None:
    assert resume(cut, "--seed", "1", "--verbose", "1", "--num-threads", "1", "--device", "cpu") == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--seed 2", "`--seed` must be 1 as in the run, got 2. Leave it out; --n-timesteps, --verbose"),
        ("--env Acrobot-v1", "`--env` must be 'CartPole-v1' as in the run"),
        ("--vec-env gymnasium", "`--vec-env` must be 'dummy'"),
        ("--checkpoint-freq 5", "`--checkpoint-freq` must be 256"),
        ("-params clip_range:0.1", "`-params` must not be given with `--resume`, got `-params clip_range:0.1`: a run"),
        ("-n 1280", "`--n-timesteps` must be more than the steps that the run has done, 1280, got 1280"),
    ],
)
def test_options_that_contradict_the_run_are_refused(
    options: str, reason: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(run, *options.split()) == 2
    assert reason in capsys.readouterr().err


def test_a_run_without_checkpoints_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    assert resume(run) == 2
    error = capsys.readouterr().err
    assert "`--resume` must name a run with checkpoints" in error
    assert "`sb3-clipvf train --env CartPole-v1 --seed 1`" in error


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere", "`--resume` must be the folder of a run .* got 'nowhere', which does not exist"),
        ("tb", "must be the folder of one run, with <environment>/args.yml"),
        (str(RUN / "best_model.zip"), "is a model without the state of its training"),
        ("", "got '', which does not exist"),
    ],
)
def test_a_path_without_a_run_is_refused(path: str, reason: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(path) == 2
    assert re.search(reason, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"callback": [{}]}, "`callback` of the run must name classes derived from BaseCallback"),
        ({"env_wrapper": [{}]}, "`env_wrapper` in .* must be names, or names with their arguments"),
        (
            {"callback": [{"subprocess.Popen": {"args": ["touch", "mark"]}}]},
            "`callback` of the run must name classes derived from BaseCallback",
        ),
        ({"env_wrapper": {"pydoc.pipepager": {"cmd": "touch mark"}}}, "`env_wrapper` of the run must name classes"),
        ({"monitor_kwargs": "__import__('os').system('touch mark') or {}"}, "`monitor_kwargs` in .* plain values"),
        ({"normalize": "__import__('os').system('touch mark') or {}"}, "`normalize` in .* must be plain values"),
    ],
)
def test_settings_that_run_code_are_refused(
    changes: dict[str, Any], reason: str, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cut / "CartPole-v1" / "config.yml"
    settings = yaml.load(path.read_text(), Loader=RunLoader)
    path.write_text(yaml.dump(OrderedDict({**settings, **changes})))
    assert resume(cut) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not Path("mark").exists()


def _name_packages(cut: Path, packages: str) -> None:
    """Name packages in a run, and put the module ``q`` beside its model."""
    path = cut / "CartPole-v1" / "args.yml"
    settings = yaml.load(path.read_text(), Loader=RunLoader)
    del settings["gym_packages"]
    path.write_text(f"{yaml.dump(dict(settings))}gym_packages: {packages}\n")
    (cut / "q.py").write_text("open('mark', 'w').close()")


@pytest.mark.parametrize("packages", ["!!python/tuple [q]", "!!set {q}", "q", "[q]"])
def test_modules_beside_the_run_are_not_imported(
    packages: str, cut: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _name_packages(cut, packages)
    monkeypatch.chdir(cut)
    monkeypatch.syspath_prepend(Path.cwd())  # as `python -m sb3_clipvf` has it
    assert resume(".") == 2
    assert "`gym_packages` in" in capsys.readouterr().err
    assert not Path("mark").exists()


@pytest.mark.parametrize("command", [f"train --resume {RUN}", "enjoy --load-checkpoint 768"])
def test_modules_of_the_log_folder_are_not_imported_from_the_working_folder(
    command: str, cut: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As the console script starts: without the working folder.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    _name_packages(cut, "[logs.q]")
    (cut / "q.py").rename(Path("logs", "q.py"))
    assert main(command.split()) == 2
    assert "`gym_packages` in" in capsys.readouterr().err
    assert not Path("mark").exists()


def test_the_folder_that_a_run_names_is_not_created(cut: Path) -> None:
    path = cut / "CartPole-v1" / "args.yml"
    settings = yaml.load(path.read_text(), Loader=RunLoader)
    path.write_text(yaml.dump(OrderedDict({**settings, "log_folder": "elsewhere/logs"})))
    assert resume(cut) == 0
    assert (cut / "CartPole-v1.zip").is_file() and not Path("elsewhere").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--checkpoint-freq many", "`--checkpoint-freq` must be a whole number, got 'many'"),
        ("--checkpoint-freq 100 --algo ppo", "`--checkpoint-freq` must be left out with --algo ppo"),
        ("--checkpoint-freq 100 -optimize", "must be left out in a search of hyperparameters"),
    ],
)
def test_a_checkpoint_frequency_without_effect_is_refused(
    options: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options.split()]) == 2
    assert reason in capsys.readouterr().err


def test_checkpoints_can_be_turned_off(tmp_path: Path) -> None:
    assert _train(tmp_path, "--checkpoint-freq", "-1", "-n", "64", "--eval-freq", "-1") == 0
    assert not (RUN / "checkpoints").exists()


# ---------------------------------------------------------------- looking at a run


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The environments that the Zoo made to show a model in."""
    from rl_zoo3 import utils

    made = []
    create = utils.create_test_env

    def spy(*args: Any, **kwargs: Any) -> Any:
        made.append(create(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(utils, "create_test_env", spy)
    return made


def enjoy(options: str) -> int:
    return main(["enjoy", *f"--env CartPole-v1 -n 3 --no-render --device cpu {options}".split()])


def _normalizer_of(path: Path) -> dict[str, Any]:
    (state,) = [layer for layer in read_checkpoint(path).tree["environments"]["layers"] if layer["obs_rms"]]
    return dict(state)


@pytest.mark.parametrize(("options", "steps"), [("--load-checkpoint 1024", 1024), ("--load-last-checkpoint", 1280)])
def test_checkpoints_are_shown_with_their_statistics(
    options: str, steps: int, run: Path, shown: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "CartPole-v1" / "vecnormalize.pkl").unlink()
    assert enjoy(options) == 0
    path = run / "checkpoints" / f"checkpoint_{steps}.zip"
    assert f"Loading {path}" in capsys.readouterr().out
    state = _normalizer_of(path)
    assert shown[0].obs_rms.mean.tolist() == state["obs_rms"][""][0].tolist()
    assert shown[0].obs_rms.count == state["obs_rms"][""][2]
    assert shown[0].ret_rms.var == state["attributes"]["ret_rms.var"]
    assert (shown[0].training, shown[0].norm_reward, shown[0].num_envs) == (False, False, 1)


def test_the_best_model_is_shown_with_its_statistics(run: Path, shown: list[Any]) -> None:
    best = ClipPPO.load(run / "best_model.zip", device="cpu").num_timesteps
    assert enjoy("--load-best") == 0
    assert enjoy("") == 0
    # Of 2 environments, one more observation each at the start.
    assert [env.obs_rms.count for env in shown] == pytest.approx([best + 2, STEPS + 2], abs=0.001)
    assert best < STEPS
    assert main("report --env CartPole-v1 --load-best --episodes 1 --no-video --device cpu".split()) == 0


def test_a_report_of_the_best_model_takes_its_statistics(run: Path) -> None:
    (run / "CartPole-v1" / "vecnormalize.pkl").unlink()
    assert main("report --env CartPole-v1 --load-best --episodes 1 --no-video --device cpu".split()) == 0


def test_the_zoos_own_checkpoints_are_found_as_before(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert enjoy("--load-checkpoint 512") == 0
    assert f"Loading {run / 'rl_model_512_steps.zip'}" in capsys.readouterr().out
    assert "rl_model_512_steps.zip has no statistics of VecNormalize: those of another step, in" in caplog.text
    caplog.clear()
    for options in ("", "--load-best", "--load-last-checkpoint"):
        assert enjoy(options) == 0
    assert "has no statistics" not in caplog.text


@pytest.mark.parametrize("options", ["", "--load-checkpoint 300"])
def test_the_error_for_a_missing_model_lists_the_checkpoints(
    options: str, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enjoy(options) == 2
    error = capsys.readouterr().err
    assert "has those of the steps 768, 1024: `--load-last-checkpoint` or `--load-checkpoint 1024`" in error
    assert f"`sb3-clipvf train --resume {cut}`" in error


def test_the_error_for_a_run_that_has_ended_does_not_name_resume(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert enjoy("--load-checkpoint 300") == 2
    assert capsys.readouterr().err.splitlines()[0].endswith("or `--load-checkpoint 1280` loads one.")
