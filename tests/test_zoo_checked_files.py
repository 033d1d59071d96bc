"""The console command reads the files of runs without running code: models, statistics, settings, replay buffers."""

import io
import os
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import hostile
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common import base_class
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import sb3_clipvf
from sb3_clipvf.files.trust import TRUST_VARIABLE, UnsafeFileError
from sb3_clipvf.zoo import COMMANDS, main
from sb3_clipvf.zoo.checked_files import RunLoader, checked_files
from sb3_clipvf.zoo.runs import evaluate_run, find_run, read_hyperparams

RUN = Path("logs") / "clipppo" / "CartPole-v1_1"
MODEL, SETTINGS = RUN / "CartPole-v1.zip", RUN / "CartPole-v1"
TRAIN = "train --env CartPole-v1 -n 32 --eval-freq 32 --eval-episodes 1 --seed 1 --device cpu --verbose 0"
PARAMETERS = ["-params", "normalize:dict(norm_obs=True,norm_reward=False)", "n_envs:2", "n_steps:16", "batch_size:16"]
# Commands that look at a run, or continue it.
LOADING = {
    "enjoy": "enjoy --env CartPole-v1 -n 4 --no-render --device cpu",
    "enjoy --load-best": "enjoy --env CartPole-v1 -n 4 --no-render --device cpu --load-best",
    "report": "report --env CartPole-v1 --episodes 1 --no-video --device cpu",
    "record_video": "record_video --env CartPole-v1 -n 4",
    "push_to_hub": "push_to_hub --env CartPole-v1 -orga nobody --device cpu",
    "train -i": f"{TRAIN} -i {MODEL} {' '.join(PARAMETERS)}",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert main([*TRAIN.split(), *PARAMETERS]) == 0
    return folder


@pytest.fixture(autouse=True)
def _clean(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(sb3_clipvf.__file__).parents[1]))
    for name in [name for name in sys.modules if name.partition(".")[0] == "logs"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def run(in_trained: Path) -> Path:
    """A copy of the run, below the working folder."""
    return in_trained / RUN


def command(name: str) -> list[str]:
    return LOADING[name].split()


def edit(path: Path, **changes: Any) -> None:
    settings = yaml.load(path.read_text(), Loader=RunLoader)
    path.write_text(yaml.dump(OrderedDict({**settings, **changes})))


# ---------------------------------------------------------------- what is put into the files of a run


def hostile_model(run: Path, mark: Path) -> str:
    for name in ("CartPole-v1.zip", "best_model.zip"):
        hostile.with_data(run / name, ep_info_buffer=hostile.os_system(mark))
    return "`ep_info_buffer` in"


def hostile_weights(run: Path, mark: Path) -> str:
    raw = pickle.loads(pickle.dumps(hostile.torch_in_torch(mark)))
    for name in ("CartPole-v1.zip", "best_model.zip"):
        entries = hostile.entries_of(run / name)
        hostile.pack(run / name, {**entries, "policy.pth": raw})
    return "'policy.pth' in"


def hostile_statistics(run: Path, mark: Path) -> str:
    (run / "CartPole-v1" / "vecnormalize.pkl").write_bytes(hostile.os_system(mark))
    best = run / "best_model.zip"
    hostile.pack(best, {**hostile.entries_of(best), "vecnormalize.pkl": hostile.os_system(mark)})
    return r"vecnormalize\.pkl( in \S+best_model\.zip)? must hold only classes"


def hostile_config(run: Path, mark: Path) -> str:
    (run / "CartPole-v1" / "config.yml").write_text(f"extra: !!python/object/apply:os.system ['touch {mark}']\n")
    return "config.yml, line 1, must hold plain data, got os.system"


def evaluated_normalize(run: Path, mark: Path) -> str:
    edit(run / "CartPole-v1" / "config.yml", normalize=f"__import__('os').system('touch {mark}') or {{}}")
    return "`normalize` in"


def called_wrapper(run: Path, mark: Path) -> str:
    # It starts a shell before it looks at its first argument.
    edit(run / "CartPole-v1" / "config.yml", env_wrapper={"pydoc.pipepager": {"cmd": f"touch {mark}"}})
    return "`env_wrapper` of the run must name classes derived from Wrapper or VecEnvWrapper"


def module_beside_the_settings(run: Path, mark: Path) -> str:
    # As an archive from the hub would bring it.
    (run / "brought.py").write_text(f"open({str(mark)!r}, 'w').close()\nfrom gymnasium import Wrapper\n")
    edit(run / "CartPole-v1" / "config.yml", env_wrapper=["logs.clipppo.CartPole-v1_1.brought.Wrapper"])
    return "`env_wrapper` in .* must name a module that is installed"


def hostile_arguments(run: Path, mark: Path) -> str:
    (run / "CartPole-v1" / "args.yml").write_text(f"env: !!python/object/apply:os.system ['touch {mark}']\n")
    return "args.yml, line 1, must hold plain data"


EVERYWHERE = [hostile_model, hostile_weights, hostile_statistics]
SETTINGS_ONLY = [hostile_config, evaluated_normalize, called_wrapper, module_beside_the_settings, hostile_arguments]
Attack = Callable[[Path, Path], str]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # The Zoo's environments, where loading the model fails.
class TestHostileRuns:
    @pytest.mark.parametrize(
        ("name", "attack"),
        [
            *((name, attack) for name in LOADING for attack in EVERYWHERE),
            # Training reads no settings of the run.
            *((name, attack) for name in LOADING if name != "train -i" for attack in SETTINGS_ONLY),
        ],
    )
    def test_they_are_refused(
        self,
        name: str,
        attack: Attack,
        run: Path,
        mark: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.syspath_prepend(Path.cwd())  # as `python -m sb3_clipvf` has it
        reason = attack(run, mark)
        assert main(command(name)) == 2
        error = capsys.readouterr().err
        assert re.search(reason, error), error
        assert not mark.exists()

    @pytest.mark.parametrize("how", ["option", "variable"])
    @pytest.mark.parametrize(
        ("name", "attack"),
        [
            ("enjoy", hostile_model),
            ("enjoy", hostile_statistics),
            ("enjoy", hostile_config),
            ("enjoy", evaluated_normalize),
            ("enjoy", module_beside_the_settings),
            ("report", hostile_statistics),
            ("record_video", hostile_arguments),
            ("train -i", hostile_model),
            ("train -i", hostile_statistics),
        ],
    )
    def test_they_run_code_if_the_user_trusts_them(
        self, how: str, name: str, attack: Attack, run: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(Path.cwd())
        attack(run, mark)
        if how == "variable":
            monkeypatch.setenv(TRUST_VARIABLE, "1")
        before = os.environ.get(TRUST_VARIABLE)
        arguments = command(name)
        options = ["--trust-pickle"] if how == "option" else []
        try:
            main([arguments[0], *options, *arguments[1:]])
        except Exception:
            pass  # what a hostile file leaves behind is seldom what the Zoo expects
        assert mark.exists()
        assert os.environ.get(TRUST_VARIABLE) == before

    @pytest.mark.slow
    def test_processes_that_are_started_check_as_well(
        self, run: Path, mark: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        hostile_statistics(run, mark)
        # The Zoo continues without this agent.
        assert main("benchmark --no-hub -n 4 --num-threads 1".split()) == 0
        assert "vecnormalize.pkl must hold only classes" in capfd.readouterr().err
        assert not mark.exists()

    def test_benchmark_reads_arguments_itself(self, run: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
        reason = hostile_arguments(run, mark)
        assert main("benchmark --no-hub -n 4".split()) == 2
        assert reason in capsys.readouterr().err
        assert not mark.exists()

    def test_data_of_plots(self, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "plot.pkl").write_bytes(hostile.os_system(mark))
        assert main(["plot_from_file", "-i", "plot.pkl"]) == 2
        assert "plot.pkl must hold only classes that are known to be safe" in capsys.readouterr().err
        assert not mark.exists()

    def test_the_functions_of_runs(self, run: Path, mark: Path) -> None:
        hostile_statistics(run, mark)
        with pytest.raises(UnsafeFileError, match="vecnormalize.pkl"):
            evaluate_run(find_run("logs", "CartPole-v1"), 1, 1, device="cpu")
        hostile_config(run, mark)
        with pytest.raises(UnsafeFileError, match="config.yml"):
            read_hyperparams(find_run("logs", "CartPole-v1"))
        assert not mark.exists()


class TestHarmlessRuns:
    @pytest.mark.parametrize("name", ["enjoy", "enjoy --load-best", "report", "train -i"])
    def test_they_load(self, name: str, run: Path) -> None:
        assert main(command(name)) == 0

    def test_wrappers_and_python_values(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        parameters = [
            "policy_kwargs:dict(activation_fn=nn.ELU,net_arch=[8])",
            "env_wrapper:'rl_zoo3.wrappers.DelayedRewardWrapper'",
        ]
        assert main([*TRAIN.split(), *PARAMETERS, *parameters]) == 0
        assert main(command("enjoy")) == 0
        settings = read_hyperparams(find_run("logs", "CartPole-v1"))
        assert settings["policy_kwargs"]["activation_fn"] is th.nn.ELU

    def test_other_algorithms_are_checked_too(self, tmp_path: Path, mark: Path) -> None:
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save("ppo.zip")
        with checked_files():
            PPO.load("ppo.zip", device="cpu").set_parameters("ppo.zip", device="cpu")
            hostile.with_data(tmp_path / "ppo.zip", extra=hostile.os_system(mark))
            with pytest.raises(UnsafeFileError, match="`extra` in ppo.zip"):
                PPO.load("ppo.zip", device="cpu")
        assert not mark.exists()

    def test_further_tensors_of_other_algorithms(self, tmp_path: Path) -> None:
        sizes: dict[str, Any] = {"buffer_size": 50, "policy_kwargs": {"net_arch": [4]}, "device": "cpu"}
        SAC("MlpPolicy", "Pendulum-v1", **sizes).save("sac.zip")
        variables = io.BytesIO()
        th.save({"policy.activation_fn": th.ones(2)}, variables)
        entries = hostile.entries_of(tmp_path / "sac.zip")
        hostile.pack(tmp_path / "other.zip", {**entries, "pytorch_variables.pth": variables.getvalue()})
        with checked_files():
            SAC.load("sac.zip", device="cpu")
            with pytest.raises(UnsafeFileError, match="declares .*log_ent_coef.*, got 'policy.activation_fn'"):
                SAC.load("other.zip", device="cpu")

    def test_replay_buffers(self, tmp_path: Path, mark: Path) -> None:
        model = DQN("MlpPolicy", "CartPole-v1", buffer_size=50, learning_starts=8, device="cpu").learn(16)
        model.save_replay_buffer("buffer.pkl")
        rewards = model.replay_buffer.rewards.copy()
        with checked_files():
            model.load_replay_buffer("buffer.pkl")
            np.testing.assert_array_equal(model.replay_buffer.rewards, rewards)
            Path("buffer.pkl").write_bytes(hostile.os_system(mark))
            with pytest.raises(UnsafeFileError, match="buffer.pkl"):
                model.load_replay_buffer("buffer.pkl")
        assert not mark.exists()

    def test_everything_is_restored(self) -> None:
        before = (yaml.UnsafeLoader, vars(VecNormalize)["load"], base_class.load_from_zip_file)
        with checked_files(), checked_files():
            assert yaml.UnsafeLoader is RunLoader
            assert VecNormalize.load is not before[1].__func__
        assert (yaml.UnsafeLoader, vars(VecNormalize)["load"], base_class.load_from_zip_file) == before

    def test_trust_replaces_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(TRUST_VARIABLE, "1")
        with checked_files():
            assert yaml.UnsafeLoader is not RunLoader

    def test_a_class_derived_from_sb3s_loads_through_it(self, tmp_path: Path) -> None:
        env = make_vec_env("CartPole-v1")
        VecNormalize(env, gamma=0.5).save("statistics.pkl")
        with checked_files():
            assert VecNormalize.load("statistics.pkl", env).gamma == 0.5


class TestSettings:
    def read(self, text: str) -> Any:
        return yaml.load(text, Loader=RunLoader)

    @pytest.mark.parametrize(
        "value",
        [
            OrderedDict([("a", (1, 2.5, "x")), ("b", None)]),
            {"activation_fn": th.nn.Tanh, "optimizer_class": th.optim.Adam},
            [np.float64(0.5), np.int64(3), np.float32(0.25)],
            {"normalize": "dict(norm_obs=True, norm_reward=False)"},
            {"normalize": "{'norm_obs': True}"},
        ],
        ids=repr,
    )
    def test_what_the_zoo_writes(self, value: Any) -> None:
        back = self.read(yaml.dump(value))
        assert back == value
        assert type(back) is type(value)

    def test_a_schedule_of_the_zoo(self) -> None:
        from rl_zoo3.utils import SimpleLinearSchedule

        back = self.read(yaml.dump({"learning_rate": SimpleLinearSchedule(0.5)}))
        assert back["learning_rate"](0.5) == 0.25

    @pytest.mark.parametrize(
        "text",
        [
            "a: !!python/object/apply:os.system ['x']",
            "!!python/object/apply:collections.OrderedDict [[[a, !!python/object/apply:os.getcwd []]]]",
            "a: !!python/name:os.system ''",
            "a: !!python/name:numpy.dtype ''",
            "a: !!python/module:antigravity ''",
            "a: !!python/object/new:subprocess.Popen ['x']",
            "a: !!python/object:subprocess.Popen {x: 1}",
            "a: !!python/object/apply:builtins.list [[1]]",
            "a: !!python/object/apply:numpy.dtype {args: [f8], state: 3}",
            "a: !!python/object/apply:numpy.dtype {args: [O]}",
            "a: !!python/object/apply:collections.deque {args: [[1]], listitems: [2]}",
            "a: !!python/object/apply:collections.deque x",
            "a: !!python/tuple x",
            "normalize: open('x', 'w')",
            "normalize: 'dict(a=open(1))'",
            "normalize: 'dict([])'",
            "normalize: '(('",
        ],
    )
    def test_what_is_refused(self, text: str) -> None:
        with pytest.raises(UnsafeFileError, match="must (hold plain data|be plain values)"):
            self.read(text)

    @pytest.mark.parametrize(
        "text",
        [
            "gym_packages: !!python/tuple [brought]",
            "gym_packages: !!set {brought}",
            "gym_packages: brought",
            "gym_packages: {brought: 1}",
            "gym_packages: [[brought]]",
            "gym_packages: [{brought: 1}]",
            "env_wrapper: !!python/tuple [brought.Own]",
            "env_wrapper: !!set {brought.Own}",
            "env_wrapper: [[brought.Own]]",
            "env_wrapper: [{}]",
            "vec_env_wrapper: {}",
            "vec_env_wrapper: 3",
        ],
    )
    def test_names_come_in_no_other_form_than_the_zoos(self, text: str) -> None:
        with pytest.raises(UnsafeFileError, match=f"`{text.partition(':')[0]}` in .* must be (a list of )?names"):
            self.read(text)

    def test_names_in_the_zoos_forms(self) -> None:
        text = "{gym_packages: [json], env_wrapper: [json.A, {json.B: {a: 1}}], vec_env_wrapper: json.C}"
        assert self.read(text)["gym_packages"] == ["json"]
        assert self.read("{gym_packages: null, env_wrapper: null}") == {"gym_packages": None, "env_wrapper": None}

    @pytest.mark.parametrize(
        "text", ["a: [", "a: !unknown 3", "{[1]: 2}", "!!python/object/apply:collections.OrderedDict [3]"]
    )
    def test_what_is_damaged(self, text: str) -> None:
        with pytest.raises(ValueError, match="could not be read"):
            self.read(text)

    @pytest.mark.parametrize("start", ["[1]", "!!python/tuple [1]", "{k: 1}"])
    def test_parts_that_double_at_each_level(self, start: str) -> None:
        form = "{{<<: [{0}, {0}]}}" if start[0] == "{" else "[{0}, {0}]"
        lines = [f"- &t{i} {start if i == 0 else form.format(f'*t{i - 1}')}" for i in range(30)]
        with pytest.raises(ValueError, match="could not be read: it refers to its own parts more than 20 times"):
            self.read("\n".join(["a:", *lines, "gym_packages: *t29"]))
        shared = {"pi": [64, 64]}
        assert self.read(yaml.dump({"a": [shared, shared, shared]}))["a"][2] == shared

    def test_missing_settings(self) -> None:
        assert self.read("") is None

    def test_modules_are_found_without_importing_them(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(Path.cwd())
        Path("own_wrappers.py").write_text("class Own: pass")
        package = Path("logs") / "package"
        package.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('imported')")
        path = run / "CartPole-v1" / "config.yml"
        for name in ("own_wrappers.Own", "rl_zoo3.wrappers.HistoryWrapper", "missing.X", "os.path.join", "math.x"):
            edit(path, env_wrapper=[name])
            with path.open() as file:
                yaml.load(file, Loader=RunLoader)
        for entry in ("logs.package.X", ["os.x", {"logs.package.sub.X": {"a": 1}}]):
            edit(path, env_wrapper=entry)
            with path.open() as file, pytest.raises(UnsafeFileError, match=r"which lies in .*logs"):
                yaml.load(file, Loader=RunLoader)

    @pytest.mark.parametrize(
        ("folder", "place"),
        [
            ("received/CartPole-v1_1", "received/own.py"),
            ("received/deep/er/CartPole-v1_1", "received/deep/own.py"),
            ("received/logs/clipppo/CartPole-v1_1", "received/own.py"),
            ("../received/CartPole-v1_1", "../received/own.py"),
        ],
    )
    def test_modules_of_a_received_folder_are_not_the_users(
        self, folder: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(tmp_path / "work")])
        path = Path(folder, "CartPole-v1", "args.yml")
        path.parent.mkdir(parents=True)
        for module in (Path(place), Path("mine.py")):
            module.write_text("raise SystemExit('imported')")
        name = ".".join(Path(place).with_suffix("").parts).lstrip(".")
        path.write_text(f"gym_packages: [{name}]\n")
        with path.open() as file, pytest.raises(UnsafeFileError, match=f"got '{name}', which lies in"):
            yaml.load(file, Loader=RunLoader)
        path.write_text("gym_packages: [mine]\n")
        with path.open() as file:
            assert yaml.load(file, Loader=RunLoader) == {"gym_packages": ["mine"]}


def test_the_option_belongs_to_the_commands_that_load(capsys: pytest.CaptureFixture[str]) -> None:
    loading = {name for name, entry in COMMANDS.items() if entry.loads}
    assert loading == set(COMMANDS) - {"compile", "plot_train", "all_plots", "load_from_hub"}
    assert main(["enjoy", "--help"]) == 0
    assert "--trust-pickle" in capsys.readouterr().out
    assert main(["load_from_hub", "--env", "CartPole-v1", "-orga", "nobody", "--trust-pickle"]) == 2
    assert "unrecognized arguments: --trust-pickle" in capsys.readouterr().err


def test_functions_that_the_zoo_offers_as_wrappers(run: Path) -> None:
    from rl_zoo3 import utils

    with checked_files():
        wrap = utils.get_wrapper_class({"env_wrapper": "rl_zoo3.utils.flatten_dict_observations"})
        assert callable(wrap)
        assert utils.get_wrapper_class({}) is None
        wrap = utils.get_wrapper_class({"env_wrapper": ["gymnasium.wrappers.FlattenObservation"]})
        assert isinstance(wrap(gym.make("CartPole-v1")), gym.wrappers.FlattenObservation)
        with pytest.raises(UnsafeFileError, match=r"got os\.system"):
            utils.get_wrapper_class({"vec_env_wrapper": "os.system"}, "vec_env_wrapper")
