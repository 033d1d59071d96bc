"""The console command, end to end on CartPole-v1."""

import gc
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3.train as zoo_train
import yaml
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from rl_zoo3 import utils
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER
from stable_baselines3 import PPO

import sb3_clipvf
from sb3_clipvf import ClipPPO
from sb3_clipvf.engines.kernels import warmup
from sb3_clipvf.zoo import COMMANDS, hyperparams_path, main

pytestmark = [
    # Optuna, of the multivariate sampler that the Zoo chooses.
    pytest.mark.filterwarnings("ignore:Argument ``multivariate`` is an experimental feature"),
]

RUN = Path("logs") / "clipppo" / "CartPole-v1_1"


@pytest.fixture(autouse=True)
def _subprocesses_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(sb3_clipvf.__file__).parents[1]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        code = main(
            "train --env CartPole-v1 -n 512 --eval-freq 256 --eval-episodes 2 --save-freq 256 --seed 1 --device cpu "
            "--verbose 0 -params clip_range_vf:None clip_range:cos_0.3".split()
        )
        assert code == 0
    return folder


@pytest.fixture
def no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cli", "options"):
        monkeypatch.setattr(f"sb3_clipvf.zoo.{module}.has_display", lambda: False)


# ---------------------------------------------------------------- the command itself


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_overview_names_each_sub_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.summary.split()] for line in lines)
    assert all(len(line) <= 120 for line in lines)


def test_the_version_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"sb3_clipvf {sb3_clipvf.__version__} (stable_baselines3 ")


@pytest.mark.parametrize(
    ("name", "hint"), [("trian", "Did you mean `train`?"), ("zzz", "`sb3-clipvf --help` lists them.")]
)
def test_an_unknown_sub_command_is_refused(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert capsys.readouterr().err == f"sb3-clipvf: `{name}` is not a sub-command. {hint}\n"


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if "rl_zoo3" in command.target])
def test_each_sub_command_of_the_zoo_shows_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = list(sys.argv)
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: " in out
    # Where the Zoo lists its algorithms, ours is among them.
    assert ("clipppo" in out) == ("--algo {" in out)
    assert sys.argv == argv


@pytest.mark.parametrize("argv", ["all_plots", "plot_from_file"])
def test_a_missing_option_that_the_zoo_needs_is_named(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argv]) == 2
    assert "must be given, got none" in capsys.readouterr().err


def test_our_own_sub_command_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def own_main(argv: list[str]) -> int:
        calls.append(argv)
        return 5

    module = type(sys)("report")
    module.main = own_main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sb3_clipvf.zoo.report", module)
    assert main(["report", "--env", "X"]) == 5
    assert calls == [["--env", "X"]]


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "sb3_clipvf", "nope"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a sub-command" in done.stderr


def test_the_command_ends_quietly_if_its_output_is_closed() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sb3_clipvf", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


# ---------------------------------------------------------------- errors


def test_an_error_of_input_is_one_line(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train -n 64 --device cpu -params clip_rang:0.1".split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("sb3-clipvf train: `clip_rang` must be an argument of ClipPPO")
    assert "Traceback" not in err


# The Zoo opens the monitors' files before the model is built, and cannot close them if that fails.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in.*monitor.csv:pytest.PytestUnraisableExceptionWarning")
def test_a_wrong_value_is_one_line_and_leaves_no_run(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train -n 64 --device cpu -params clip_range:'linear'".split()) == 2
    gc.collect()
    assert "`clip_range` must be a schedule, got 'linear'" in capsys.readouterr().err
    assert not RUN.exists()


def test_an_environment_variable_shows_the_traceback(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_CLIPVF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="`clip_rang` must be"):
        main("train -n 64 --device cpu -params clip_rang:0.1".split())


def test_an_unknown_environment_is_one_line(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--env", "CartPole-v7"]) == 2
    assert "CartPole-v7 not found in gym registry, you maybe meant CartPole-v" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "-optimize --sampler auto",
            "optunahub must be installed for this. Run `pip install optunahub cmaes`. (`--sam",
        ),
        ("-params n_steps=64", "`-params` must be pairs of key and value with a colon, got 'n_steps=64'"),
        ("-params policy:MlpPolicy", "`-params` must have Python values, got 'policy:MlpPolicy'"),
        ("--env-kwargs length=3", "`--env-kwargs` must be pairs of key and value"),
        ("--eval-env-kwargs length", "`--eval-env-kwargs` must be pairs of key and value"),
        ("--gym-packages not_there", "`--gym-packages` must name modules that can be imported, got 'not_there'"),
        ("--gym-packages broken", "got 'broken': SyntaxError: "),
        ("--gym-packages faulty", "got 'faulty': ZeroDivisionError: division by zero. Correct the name or the module"),
        ("--conf-file missing.yml", "got 'missing.yml': No such file or directory"),
        ("--conf-file missing.py", "got 'missing.py': No such file or directory"),
        ("--conf-file not_there", "got 'not_there': ModuleNotFoundError: No module named 'not_there'"),
        ("--conf-file empty.yml", "`--conf-file` must hold a dict of settings for each environment, got None"),
        ("--conf-file empty.yml --algo ppo", "`--conf-file` must hold a dict of settings"),
        ("--conf-file broken.yml", "got 'broken.yml': while parsing a flow node"),
        ("--conf-file entry.yml", "got None for CartPole-v1 in entry.yml"),
        ("--conf-file empty.py", "got 'empty.py': KeyError: 'hyperparams'"),
        ("--conf-file broken.py", "got 'broken.py': SyntaxError"),
        ("-f empty.yml", "`--log-folder` must be a folder that can be written to, got 'empty.yml'"),
        ("-tb empty.yml/here", "`--tensorboard-log` must be a folder that can be written to"),
        ("-n 1.5", "`-n/--n-timesteps` must be a whole number, got '1.5'"),
        ("--checkpoint-freq often", "`--checkpoint-freq` must be a whole number, got 'often'"),
        ("--vec-env foo", "`--vec-env` must be one of 'dummy', 'subproc', 'gymnasium', 'envpool', 'ale', got 'foo'"),
        ("--storage nonsense --study-name s --trial-id 0", "`--storage` must be a storage of Optuna, got 'nonsense'"),
        ("--storage sqlite:///no/x.db --study-name s -optimize", "`--storage` must be a storage of Optuna"),
        ("--storage study.log --study-name s --trial-id 0", "`--study-name` must be a study in study.log, got 's'"),
    ],
)
def test_wrong_input_is_one_line(
    options: str,
    message: str,
    in_empty_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("envpool", "optunahub"):
        monkeypatch.setitem(sys.modules, package, None)
    files = {"broken.yml": "a: [", "entry.yml": "CartPole-v1:", "broken.py": "hyperparams = {", "faulty.py": "1 / 0"}
    for name, text in files.items():
        Path(name).write_text(text)
    Path("empty.yml").touch()
    Path("empty.py").touch()
    assert main(f"train -n 64 --device cpu --verbose 0 {options}".split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("sb3-clipvf train: ")
    assert message in lines[0]
    assert lines[1:] == ["(Set SB3_CLIPVF_TRACEBACK=1 to see the traceback.)"]
    assert not any(Path("logs").glob("*/*"))


def test_float_notation_and_modules_of_the_working_folder_are_accepted(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    Path("own_cart_pole.py").write_text(
        "import gymnasium as gym\n"
        'gym.register("OwnCartPole-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=50)\n'
    )
    options = "--gym-packages own_cart_pole --env OwnCartPole-v0 -n 1.28e2 --checkpoint-freq 1e3 --eval-freq -1"
    params = "--device cpu --verbose 0 -params n_envs:2 n_steps:64 batch_size:64"
    assert main(f"train {options} {params}".split()) == 0
    model = ClipPPO.load(Path("logs/clipppo/OwnCartPole-v0_1/OwnCartPole-v0.zip"), device="cpu")
    assert model.num_timesteps == 128
    assert os.getcwd() not in sys.path


def test_a_missing_run_is_one_line(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["enjoy", "--no-render"]) == 2
    assert f"The {Path('logs', 'clipppo')} folder was not found" in capsys.readouterr().err.replace(
        "/CartPole-v1_0", ""
    )


def test_a_missing_package_is_named_with_its_extra(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "--track"]) == 2
    assert "pip install 'sb3_clipvf[tracking]'" in capsys.readouterr().err


def test_a_missing_package_of_an_environment_is_named_with_its_extra(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "Box2D", None)
    assert main("train --env LunarLander-v3 -n 64 --device cpu".split()) == 2
    assert (
        "the package Box2D must be installed for this. Run `pip install 'sb3_clipvf[box2d]'`" in capsys.readouterr().err
    )


def test_the_exit_code_of_the_zoos_parser_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--no-such-option"]) == 2
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(zoo_train, "train", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["train"])


# ---------------------------------------------------------------- a run


def test_training_writes_the_zoos_files(trained: Path) -> None:
    run = trained / RUN
    for name in (
        "CartPole-v1.zip",
        "best_model.zip",
        "evaluations.npz",
        "rl_model_256_steps.zip",
        "rl_model_512_steps.zip",
    ):
        assert (run / name).is_file(), name
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [256, 512]
    saved = dict(yaml.unsafe_load((run / "CartPole-v1" / "config.yml").read_text()))
    entry = yaml.safe_load(hyperparams_path().read_text())["CartPole-v1"]
    assert saved == {**entry, "clip_range_vf": None, "clip_range": "cos_0.3"}


def test_the_trained_model_is_a_clipppo_with_the_given_parameters(trained: Path) -> None:
    model = ClipPPO.load(trained / RUN / "CartPole-v1.zip", device="cpu")
    assert (model.clip_range, model.clip_range_vf, model.num_timesteps) == ("cos_0.3", None, 512)


@pytest.mark.parametrize("command", ["enjoy --no-render", "report --no-video"])
def test_an_unknown_device_of_a_model_is_one_line(
    command: str, in_trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"{command} --device gpu".split()) == 2
    assert "`device` must be 'auto' or a PyTorch device, got 'gpu'" in capsys.readouterr().err


def test_enjoy_runs_the_latest_run(in_trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("enjoy --no-render -n 600 --device cpu".split()) == 0
    out = capsys.readouterr().out
    assert f"Loading {RUN / 'CartPole-v1.zip'}" in out
    assert "Mean reward: " in out


def test_enjoy_does_not_render_without_a_display(
    in_trained: Path, capsys: pytest.CaptureFixture[str], no_display: None
) -> None:
    assert main("enjoy -n 5 --load-best --device cpu".split()) == 0
    assert "No display: running with --no-render" in capsys.readouterr().out


@pytest.fixture
def own_run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The trained run as one of an environment that a module in the working folder registers, under a unique ID."""
    name = "1_0b0c7c1e-5a52-4a51-8c3e-111111111111"
    run = tmp_path / "logs" / "clipppo" / f"Registered-v0_{name}"
    shutil.copytree(trained / RUN, run)
    (run / "CartPole-v1").rename(run / "Registered-v0")
    (run / "CartPole-v1.zip").rename(run / "Registered-v0.zip")
    settings = run / "Registered-v0" / "args.yml"
    arguments = dict(yaml.unsafe_load(settings.read_text()))
    settings.write_text(yaml.dump({**arguments, "env": "Registered-v0", "gym_packages": ["registering_module"]}))
    (tmp_path / "registering_module.py").write_text(
        "import gymnasium as gym\n"
        'gym.register("Registered-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=20)\n'
    )
    monkeypatch.chdir(tmp_path)
    # As after a search of hyperparameters, or a training that failed.
    (tmp_path / "logs" / "clipppo" / "Registered-v0_2").mkdir()
    yield run
    sys.modules.pop("registering_module", None)
    gym.registry.pop("Registered-v0", None)


@pytest.mark.parametrize(
    ("command", "trace"),
    [
        ("enjoy --no-render -n 30 --device cpu", "Mean reward: "),
        ("record_video -n 5", "Saving video to"),
        ("report --episodes 1 --no-video --device cpu", "mean return"),
        ("enjoy --no-render -n 30 --device cpu --exp-id 1_0b0c7c1e-5a52-4a51-8c3e-111111111111", "Mean reward: "),
        ("enjoy --no-render -n 30 --device cpu --exp-id 1 --load-best", "Mean reward: "),
    ],
)
def test_runs_of_packages_with_unique_ids_are_found_behind_newer_ones_without_a_model(
    command: str, trace: str, own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--env", "Registered-v0"]) == 0
    out = capsys.readouterr().out
    assert own_run.name in out
    assert trace in out


def test_a_video_of_each_model_is_recorded_for_the_run_that_has_them(
    own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 1)
    assert main(["record_training", "--env", "Registered-v0"]) == 2
    (call,) = calls
    assert call[call.index("--exp-id") + 1] == "1_0b0c7c1e-5a52-4a51-8c3e-111111111111"


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("enjoy --no-render", "Name it by `--gym-packages`, or add it there."),
        ("record_video", "Add the module there."),
        ("push_to_hub -orga someone", "Add the module there."),
    ],
)
def test_a_run_whose_environment_nothing_registers_is_one_line(
    command: str, hint: str, own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("registering_module.py").write_text("")
    assert main([*command.split(), "--env", "Registered-v0"]) == 2
    message = capsys.readouterr().err.splitlines()[0]
    assert "Registered-v0 not found in gym registry, and `gym_packages` in " in message
    assert message.endswith(f"args.yml names no module that registers it. {hint}")


def test_a_missing_package_of_a_run_is_named(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("registering_module.py").unlink()
    assert main("enjoy --no-render --env Registered-v0".split()) == 2
    assert "args.yml` must name modules that can be imported, got 'registering_module'" in capsys.readouterr().err


def test_training_continues_from_a_model(in_trained: Path) -> None:
    agent = RUN / "CartPole-v1.zip"
    assert main(f"train -i {agent} -n 256 --eval-freq -1 --device cpu --verbose 0 -params clip_range:0.1".split()) == 0
    model = ClipPPO.load(RUN.with_name("CartPole-v1_2") / "CartPole-v1.zip", device="cpu")
    before = ClipPPO.load(agent, device="cpu")
    assert model.clip_range == 0.1
    # 20 epochs for each rollout of 256 steps: two before, one more now.
    assert (before._n_updates, model._n_updates) == (40, 60)


def test_other_algorithms_train_as_before(in_empty_folder: Path) -> None:
    assert main("train --algo ppo -n 256 --eval-freq -1 --device cpu --verbose 0".split()) == 0
    run = Path("logs") / "ppo" / "CartPole-v1_1"
    model = PPO.load(run / "CartPole-v1.zip", device="cpu")
    # The Zoo's own settings, and its own schedule object in place of the string.
    assert model.clip_range.value_schedule.initial_value == 0.2


@pytest.mark.slow
def test_benchmark_evaluates_our_runs_in_any_folder(
    in_trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    RUN.with_name("CartPole-v1_2").mkdir()  # without a model or settings
    assert main("benchmark --no-hub -n 400 --num-threads 1".split()) == 0
    table = Path("benchmark.md").read_text().splitlines()
    assert any(line.replace(" ", "").startswith("|clipppo|CartPole-v1|") for line in table)


def test_benchmark_of_a_missing_folder_is_refused(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--no-hub"]) == 2
    assert "`--log-dir` must be a folder of trained agents, got 'logs', which does not exist" in capsys.readouterr().err
    Path("logs").mkdir()
    assert main(["benchmark", "--no-hub"]) == 0
    assert Path("logs/benchmark/benchmark.md").is_file()


def test_benchmark_without_a_network_names_its_option(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class UnreachableError(Exception):
        """As the errors of each HTTP library: of no class of Python's."""

    def list_models(*_: Any, **__: Any) -> None:
        raise UnreachableError("Name or service\nnot known")

    monkeypatch.setattr("rl_zoo3.utils.HfApi", lambda: Namespace(list_models=list_models))
    listed = utils.get_hf_trained_models
    Path("rl-trained-agents").mkdir()
    assert main(["benchmark", "--log-dir", "rl-trained-agents"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == (
        "sb3-clipvf benchmark: `--no-hub` must be given if the Hugging Face hub cannot be read, got: Name or "
        "service not known. Pass it to evaluate only the agents of `--log-dir`."
    )
    assert utils.get_hf_trained_models is listed


def test_a_download_without_a_network_is_one_line(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main("load_from_hub --env CartPole-v1".split()) == 2
    assert "cannot find the requested files in the local cache" in capsys.readouterr().err.splitlines()[0]


def test_plots_are_written_to_files_without_a_display(
    in_trained: Path, no_display: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("plot_train -e CartPole -w 2".split()) == 0
    assert main("all_plots -e CartPole --no-million -o post".split()) == 0
    for name in ("plot_train_1.png", "all_plots_1.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    assert f"No display: figure written to {in_trained / 'plot_train_1.png'}" in capsys.readouterr().out
    assert Path("post.pkl").is_file()


def test_a_video_is_recorded(in_trained: Path) -> None:
    assert main("record_video -n 10".split()) == 0
    videos = list((RUN / "videos").glob("*.mp4"))
    assert [video.name for video in videos] == ["final-model-clipppo-CartPole-v1-step-0-to-step-10.mp4"]


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What was uploaded to a hub that takes everything, and downloads it again."""
    found: list[tuple[str, Path]] = []

    class Hub:
        def create_repo(self, **kwargs: Any) -> str:
            return "the repository's address"

        def snapshot_download(self, local_dir: Path, **kwargs: Any) -> None:
            local_dir.mkdir(parents=True)

        def upload_folder(self, repo_id: str, folder_path: Path, **kwargs: Any) -> None:
            found.append((repo_id, folder_path))

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        folders = [folder for name, folder in found if name == repo_id]
        missing: Any = SimpleNamespace(headers={}, request=None)
        if not folders:
            raise RepositoryNotFoundError("401 Client Error.", response=missing)
        if not (folders[-1] / filename).is_file():
            raise RemoteEntryNotFoundError("404 Client Error.", response=missing)
        return str(folders[-1] / filename)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return found


def test_a_run_is_uploaded_with_a_card_that_knows_clipppo(in_trained: Path, uploads: list[tuple[str, Path]]) -> None:
    assert main("push_to_hub --env CartPole-v1 -orga someone --no-render --device cpu".split()) == 0
    ((repo_id, folder),) = uploads
    assert repo_id == "someone/clipppo-CartPole-v1"
    card = (Path(folder) / "README.md").read_text()
    assert "python -m sb3_clipvf enjoy --algo clipppo --env CartPole-v1" in card
    assert "In a clone of sb3_clipvf, install it with the RL Zoo:\n" in card
    assert not re.search(r"rl_zoo3\.|install rl_zoo3|install sb3_clipvf", card)
    assert (Path(folder) / "clipppo-CartPole-v1.zip").is_file()


@pytest.mark.parametrize("normalize", [False, True])
def test_an_uploaded_run_is_downloaded_and_trained(
    normalize: bool, in_empty_folder: Path, uploads: list[tuple[str, Path]]
) -> None:
    options = f"-n 64 --eval-freq -1 --device cpu --verbose 0 -params normalize:{normalize} n_envs:1 batch_size:32"
    assert main(f"train {options}".split()) == 0
    assert main("push_to_hub --env CartPole-v1 -orga someone --no-render --device cpu".split()) == 0
    assert main("load_from_hub --env CartPole-v1 -orga someone -f loaded".split()) == 0
    run = Path("loaded/clipppo/CartPole-v1_1")
    assert (run / "CartPole-v1/vecnormalize.pkl").is_file() is normalize
    assert main(f"train -i {run}/CartPole-v1.zip {options}".split()) == 0


def test_enjoy_downloads_agents_of_the_zoo(in_trained: Path, uploads: list[tuple[str, Path]]) -> None:
    assert main("push_to_hub --env CartPole-v1 -orga sb3 --no-render --device cpu".split()) == 0
    assert main("enjoy --env CartPole-v1 -f rl-trained-agents -n 10 --no-render --device cpu".split()) == 0
    assert Path("rl-trained-agents/clipppo/CartPole-v1_1/CartPole-v1.zip").is_file()


def test_what_the_hub_does_not_have_is_one_line(
    in_trained: Path, uploads: list[tuple[str, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("load_from_hub --env CartPole-v1".split()) == 2
    assert "-orga` and `-name` must name a repository of the Hugging Face hub, got sb3/" in capsys.readouterr().err
    assert main("push_to_hub --env CartPole-v1 -orga someone --no-render --device cpu".split()) == 0
    (uploads[0][1] / "config.yml").unlink()
    assert main("load_from_hub --env CartPole-v1 -orga someone".split()) == 2
    assert (
        "clipppo-CartPole-v1 on the Hugging Face hub must be an agent of the RL Zoo, got no config.yml. Correct "
        "`--algo`, `--env` or `-name`." in (capsys.readouterr().err.splitlines()[-2])
    )


def test_a_run_of_a_package_is_uploaded(own_run: Path, uploads: list[tuple[str, Path]]) -> None:
    assert main("push_to_hub --env Registered-v0 -orga someone --no-render --device cpu".split()) == 0
    assert [repo_id for repo_id, _ in uploads] == ["someone/clipppo-Registered-v0"]


# ---------------------------------------------------------------- hyperparameter search

SMALL = {"n_steps_pow": 5, "n_minibatches_pow": 0, "n_epochs": 1, "net_arch": "tiny"}


def _study_storage(kind: str) -> tuple[str, Any]:
    if kind == "sqlite":
        return "sqlite:///study.db", "sqlite:///study.db"
    backend = optuna.storages.journal.JournalFileBackend("journal.log")
    return "journal.log", optuna.storages.JournalStorage(backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--study-name t --trial-id 0", "`--study-name` must be a study in sqlite:///study.db, got 't'. It has s."),
        ("--study-name s --trial-id 99", "`--trial-id` must be a trial of 's' that drew hyperparameters, got 99."),
        ("--study-name s --trial-id -1", "`--trial-id` must be a trial of 's'"),
        ("--study-name s --trial-id 1", "got 1, which has no 'n_steps_pow'. `--algo` names another algorithm."),
        ("--study-name s --trial-id 2", "that drew hyperparameters, got 2. These did: 0, 1."),
        ("--study-name s", "`--trial-id` must be given with `--storage`, got none."),
    ],
)
def test_a_trial_that_cannot_be_trained_is_one_line(
    options: str, message: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = optuna.create_study(study_name="s", storage="sqlite:///study.db", direction="maximize")
    drawn = {"x": optuna.distributions.FloatDistribution(0, 1)}
    for params in ({"x": 0.1}, {"x": 0.2}, {}):
        study.add_trial(
            optuna.create_trial(params=params, distributions=drawn if params else {}, value=1.0)  # type: ignore[arg-type]
        )
    assert main(f"train -n 64 --device cpu --storage sqlite:///study.db {options}".split()) == 2
    assert message in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (optuna.exceptions.TrialPruned, "No trial was completed: all were pruned or failed. Use a larger `--n-trials`"),
        (KeyboardInterrupt, "The search was interrupted before a trial was completed. With `--storage`"),
    ],
)
def test_a_search_without_a_completed_trial_is_one_line(
    error: type[BaseException],
    message: str,
    in_empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(self: Any, trial: optuna.Trial) -> float:
        raise error

    monkeypatch.setattr(zoo_train.ExperimentManager, "objective", end)
    assert main("train -optimize -n 64 --n-trials 2 --no-optim-plots --device cpu --verbose 0".split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_hyperparameters_are_searched_and_a_trial_is_trained(kind: str, in_empty_folder: Path) -> None:
    name, storage = _study_storage(kind)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    # What is not given here is drawn; these keep the trials short.
    for form in ("adaptive_kl", "clip"):
        study.enqueue_trial({**SMALL, "objective": form})
    options = f"--storage {name} --study-name s --device cpu --verbose 0 --eval-freq -1"
    search = (
        f"train -optimize -n 64 --n-trials 2 --eval-episodes 1 --no-optim-plots --seed 0 -params n_envs:1 {options}"
    )
    assert main(search.split()) == 0
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert {trial.distributions["n_steps_pow"].high for trial in trials} == {5}  # since trials are short
    if kind == "journal":
        return
    assert main(f"train -n 64 --trial-id 1 {options}".split()) == 0
    (run,) = Path("logs/clipppo").glob("CartPole-v1_*/CartPole-v1.zip")
    model = ClipPPO.load(run, device="cpu")
    expected = {**HYPERPARAMS_CONVERTER["clipppo"](trials[1].params), "n_envs": 1}  # not 8, as in the settings
    del expected["policy_kwargs"]
    assert {key: getattr(model, key) for key in expected} == expected


class TestCompile:
    @pytest.mark.slow
    def test_it_fills_the_folder(self, tmp_path: Path) -> None:
        """In a process of its own, as its kernels are compiled once in a process."""

        program = (
            "import sys\n"
            "from sb3_clipvf.engines.kernels import warmup\n"
            "from sb3_clipvf.zoo import main\n"
            "del warmup.GROUPS['native']\n"  # takes most of the time
            "sys.exit(main(['compile']))\n"
        )

        def run() -> str:
            result = subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
                capture_output=True,
                text=True,
                check=True,
                timeout=3600,
            )
            return result.stdout

        assert {"native", "kl_of_rollout", "fused"} == set(warmup.GROUPS)
        assert re.fullmatch(rf"The kernels were compiled in [\d.]+ s. They are in {tmp_path}.*\n", run())
        kept = {path.name.partition("-")[0] for path in tmp_path.rglob("*.nbi")}
        kernels = [kernel.__name__ for name in ("kl_of_rollout", "fused") for kernel in warmup.GROUPS[name][0]]
        assert {name.rpartition(".")[2] for name in kept} >= {"_scale_rows", *kernels}
        assert "The kernels were read in" in run()

    def test_without_a_writable_folder_it_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled_into(None, monkeypatch)
        assert main(["compile"]) == 1

    @pytest.mark.parametrize("named", ["/shared/kernels", "/home", ""])
    def test_if_the_folder_named_is_not_used_it_fails(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], named: str
    ) -> None:
        monkeypatch.setattr("numba.config.CACHE_DIR", named)
        self.compiled_into("/home/user/.cache/numba/kernels_1", monkeypatch)
        fails = named == "/shared/kernels"
        assert main(["compile"]) == fails
        out, err = capfd.readouterr()
        assert bool(out) != fails
        expected = "`NUMBA_CACHE_DIR` must be a writable folder, got '/shared/kernels'. Kernels were kept in /home/user"
        assert (expected in err) == fails

    def compiled_into(self, folder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel = SimpleNamespace(signatures=["one"], stats=SimpleNamespace(cache_path=folder, cache_misses=1))
        monkeypatch.setattr(warmup, "GROUPS", {"one": ((kernel,), lambda: None)})
