"""Options of the sub-commands: defaults, options of this package, pairs of key and value, checks of values."""

import importlib
import runpy
import sys
from argparse import ArgumentParser, Namespace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import rl_zoo3.train as zoo_train
from rl_zoo3.utils import StoreDict

from sb3_clipvf.distributed import Group
from sb3_clipvf.zoo import COMMANDS, main, register
from sb3_clipvf.zoo import options as own_options
from sb3_clipvf.zoo.experiment import ClipPPOExperimentManager
from sb3_clipvf.zoo.hub import own_model_card
from sb3_clipvf.zoo.options import prepare_options

register()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_timesteps": 0}, "`--n-timesteps` must be a whole number of at least 1, got 0"),
        ({"eval_episodes": 0}, "`--eval-episodes` must be a whole number of at least 1, got 0"),
        ({"n_eval_envs": 0}, "`--n-eval-envs` must be"),
        ({"n_trials": 0}, "`--n-trials` must be"),
        ({"log_interval": 0}, r"`--log-interval` must not be 0\. .* or -2 to turn"),
        ({"n_jobs": -1}, "`--n-jobs` must be"),
        ({"num_threads": 0}, "`--num-threads` must be"),
        ({"seed": 2**32, "trained_agent": ""}, r"`--seed` must be a whole number in \[-4294967295, 4294967295\]"),
        ({"seed": -1}, r"`--seed` must be a whole number in \[0, 4294967295\], got -1"),
        ({"episode_window": 0}, "`--episode-window` must be a whole number of at least 1, got 0"),
        ({"log_folder": ""}, "`--log-folder` must be a folder, got ''"),
        ({"algo": "ppo", "device": "gpu"}, "`device` must be 'auto' or a PyTorch device, got 'gpu'"),
        ({"trial_id": None, "storage": "x.log", "study_name": "s"}, "`--trial-id` must be given with `--storage`"),
        ({"trial_id": None, "storage": None, "study_name": "s"}, "`--storage` must be given with `--study-name`"),
        ({"trial_id": 0, "storage": None, "study_name": None}, "`--storage` must be given with `--trial-id`"),
        (
            {"hyperparams": {"policy": "CnnPolicy"}, "trained_agent": "a.zip"},
            "`policy` must be left out of `-params` with `--trained-agent`, got 'CnnPolicy': the agent keeps its own",
        ),
        ({"hyperparams": {"policy_kwargs": {}}, "trained_agent": "a.zip"}, "`policy_kwargs` must be left out"),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_options(Namespace(**given))


@pytest.mark.parametrize(
    "given",
    [
        {
            "n_timesteps": -1,
            "num_threads": -1,
            "seed": -1,
            "trained_agent": "",
            "max_total_trials": None,
            "n_evaluations": None,
        },
        {"trial_id": None, "storage": "x.log", "study_name": None, "optimize_hyperparameters": True},
        {"trial_id": 0, "storage": "x.log", "study_name": "s"},
        {"hyperparams": {"policy": "CnnPolicy"}, "trained_agent": ""},
        {"hyperparams": {"gamma": 0.9}, "trained_agent": "a.zip"},
        {"tensorboard_log": "", "output_folder": None, "gym_packages": ["json"]},
    ],
)
def test_the_zoos_own_defaults_are_legal(given: dict[str, Any]) -> None:
    prepare_options(Namespace(**given))


@pytest.mark.parametrize("name", ["log_folder", "tensorboard_log", "output_folder", "reward_log", "benchmark_dir"])
def test_folders_that_cannot_be_written_to_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"`--{name.replace('_', '-')}` must be a folder that can be written to"):
        prepare_options(Namespace(**{name: str(tmp_path / "file" / "logs")}))


def test_commands_that_would_delete_other_files_are_refused(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("logs/clipppo").mkdir(parents=True)
    assert main("load_from_hub --env E-v0 --force --exp-id -1".split()) == 2
    assert "the Zoo would delete all runs in logs/clipppo. Pass a number" in capsys.readouterr().err
    for name in ("test.mp4", "of_mine.meta.json"):
        Path(name).touch()
        assert main("push_to_hub --env E-v0 -orga someone".split()) == 2
        assert f"the working folder has {name}, which" in capsys.readouterr().err
        assert main("push_to_hub --env E-v0 -orga someone --no-render".split()) == 2
        assert "No model found for clipppo on E-v0" in capsys.readouterr().err
        Path(name).unlink()


@pytest.mark.parametrize("module", ["not_there", "not.there", ".", "json.not_there"])
def test_modules_that_cannot_be_imported_are_refused(module: str) -> None:
    with pytest.raises(ImportError, match="`--gym-packages` must name modules that can be imported"):
        prepare_options(Namespace(gym_packages=[module]))


class _ParsedError(Exception):
    """Ends a script of the RL Zoo once its options are parsed."""


def _parsed(name: str, *arguments: str) -> Namespace:
    """Return the options that a script of the RL Zoo gets."""
    seen: list[Namespace] = []

    def stop(options: Namespace) -> None:
        seen.append(options)
        raise _ParsedError

    module, _, function = COMMANDS[name].target.partition(":")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(own_options, "_CHECKS", {})
        monkeypatch.setattr(own_options, "prepare_options", stop)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(_ParsedError), own_options.command_options(name), own_model_card():
            if function:
                getattr(importlib.import_module(module), function)()
            package, _, script = module.rpartition(".")
            runpy.run_path(str(files(package) / f"{script}.py"), run_name="__main__")
    return seen[0]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("train", "", {"algo": "clipppo"}),
        ("enjoy", "", {"algo": "clipppo", "folder": "logs"}),
        ("record_video", "", {"algo": "clipppo", "folder": "logs"}),
        ("record_training", "", {"algo": "clipppo", "folder": "logs"}),
        ("push_to_hub", "--env E -orga o", {"algo": "clipppo", "folder": "logs"}),
        ("load_from_hub", "--env E", {"algo": "clipppo", "folder": "logs"}),
        ("plot_train", "-e E", {"algo": "clipppo", "exp_folder": "logs"}),
        ("all_plots", "-e E", {"algos": ["clipppo"], "exp_folders": ["logs"], "max_timesteps": float("inf")}),
        ("benchmark", "", {"log_dir": "logs"}),
        ("enjoy", "-fhere --alg=ppo", {"algo": "ppo", "folder": "here"}),
        ("all_plots", "-e E -f a b -max 9", {"algos": ["clipppo"], "exp_folders": ["a", "b"], "max_timesteps": 9}),
    ],
)
def test_defaults_are_set_where_the_user_gives_none(name: str, arguments: str, expected: dict[str, Any]) -> None:
    options = vars(_parsed(name, *arguments.split()))
    assert {key: options[key] for key in expected} == expected
    assert set(COMMANDS[name].defaults) == set(expected)


@pytest.mark.parametrize(
    ("arguments", "vec_env", "checkpoint_freq"),
    [
        ("", None, 100_000),
        ("--vec-env gymnasium --checkpoint-freq 1e3", "gymnasium", 1000),
        ("--vec=ale --ch -1", "ale", -1),
        ("--vec-env subproc --algo ppo --checkpoint-freq -1", None, -1),
    ],
)
def test_own_options_of_train_reach_the_experiment_manager(
    arguments: str, vec_env: str | None, checkpoint_freq: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = ClipPPOExperimentManager
    seen: list[Any] = []
    pass_on = own_options._train_options

    def spy(*args: Any) -> Namespace:
        options = pass_on(*args)
        seen.append((manager.vec_env, manager.checkpoint_freq))
        return options

    monkeypatch.setattr(own_options, "_train_options", spy)
    options = _parsed("train", *arguments.split())
    assert seen == [(vec_env, checkpoint_freq)]
    assert options.vec_env == ("subproc" if "subproc" in arguments else "dummy")
    assert not {"checkpoint_freq", "resume", "trust_pickle"} & set(vars(options))
    assert (manager.vec_env, manager.checkpoint_freq, manager.resumed) == (None, -1, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checkpoint-freq 64 --algo ppo", "`--checkpoint-freq` must be left out with --algo ppo, got 64: only"),
        (
            "-optimize -i agent.zip",
            "`--trained-agent` must be left out in a search of hyperparameters, got 'agent.zip'",
        ),
        ("-optimize --algo ppo -i agent.zip", "`--trained-agent` must be left out in a search"),
        ("-optimize --checkpoint-freq 64", "`--checkpoint-freq` must be left out in a search"),
        (
            "-optimize --save-freq 64",
            "`--save-freq` must be left out in a search of hyperparameters, got 64: each trial",
        ),
        ("-optimize --trial-id 0 --storage study.log --study-name s", "`--trial-id` must be left out in a search"),
        (
            "-optimize -params n_envs:2 gamma:0.9 policy_kwargs:dict()",
            "`gamma` must be left out of `-params` in a search of hyperparameters, got 0.9: each trial draws its own",
        ),
        ("-optimize --algo ppo --save-freq 64 -params gamma:0.9", "`--save-freq` must be left out in a search"),
    ],
)
def test_options_that_have_no_effect_are_refused(arguments: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments.split()])
    with pytest.raises(ValueError, match=f"^{message}"):
        with own_options.command_options("train"):
            zoo_train.train()


@pytest.mark.parametrize("options", ["-optimize -params n_envs:2 normalize:True target_kl:0.1", "-params gamma:0.9"])
def test_pairs_that_a_search_does_not_draw_are_accepted(options: str) -> None:
    assert _parsed("train", *options.split()).hyperparams


def _pairs(*texts: str) -> Any:
    return _parsed("train", *(part for text in texts for part in ("-params", *text.split(" ")))).hyperparams


def test_pairs_are_those_of_the_zoo() -> None:
    text = "n_steps:64 policy:'a:b' policy_kwargs:dict(activation_fn=nn.ReLU)"
    parser = ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    assert _pairs(text) == parser.parse_args(["-params", *text.split(" ")]).params


@pytest.mark.parametrize("text", ["clip_range:lin_0.2", "clip_range:'lin_0.2'"])
def test_schedules_need_no_quotes(text: str) -> None:
    assert _pairs(text) == {"clip_range": "lin_0.2"}


def test_pairs_of_a_repeated_option_add_up() -> None:
    assert _pairs("n_steps:64 gamma:0.9", "gamma:0.8") == {"n_steps": 64, "gamma": 0.8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_steps=64", r"a colon, got 'n_steps=64'. Write `n_steps:64`."),
        ("clip_range", r"a colon, got 'clip_range'. Write `key:value`."),
        ("clip_range:", r"a colon, got 'clip_range:'. Write `key:value`."),
        (":3", r"a colon, got ':3'"),
        ("policy:MlpPolicy", r"NameError.* Quote text inside the shell's quotes: \"policy:'MlpPolicy'\"."),
        ("clip_range_vf:null", r"NameError.* Write `clip_range_vf:None`."),
        ("use_sde:true", r"NameError.* Write `use_sde:True`."),
        ("gamma:1/0", "ZeroDivisionError"),
        ("net:dict(a=1", "SyntaxError"),
    ],
)
def test_what_is_no_pair_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"`-params` must .*{message}"):
        _pairs(text)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("optimize_hyperparameters", True, "--optimize-hyperparameters"),
        ("track", True, "--track"),
        ("algo", "ppo", "--algo"),
    ],
)
def test_what_processes_cannot_do_together_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any, shown: str
) -> None:
    monkeypatch.setattr(own_options, "current_group", lambda: Group(0, 2))
    given = {"optimize_hyperparameters": False, "resume": None, "track": False, "algo": "clipppo", name: value}
    with pytest.raises(ValueError, match=f"`{shown}` must .* run on several processes"):
        own_options._train_options(lambda options: options, Namespace(**given))


@pytest.mark.parametrize(("rank", "arguments", "seed"), [(0, "", None), (1, "", 7), (1, "--seed 3", 7)])
def test_processes_have_one_seed_and_the_first_one_keeps_files(
    monkeypatch: pytest.MonkeyPatch, rank: int, arguments: str, seed: int | None
) -> None:
    class Fake(Group):
        def broadcast(self, value: Any) -> Any:
            return value if self.rank == 0 else 7

    monkeypatch.setattr(own_options, "current_group", lambda: Fake(rank, 2))
    options = _parsed("train", *arguments.split())
    assert options.seed >= 0 and seed in (None, options.seed)
    assert (options.log_folder == "logs") is (rank == 0)
    assert rank == 0 or not Path(options.log_folder).exists()  # it is gone with the command
