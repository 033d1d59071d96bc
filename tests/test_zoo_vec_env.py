"""``sb3-clipvf train --vec-env``: classes of the environments, effect of the Zoo's settings, and refusals."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecFrameStack, VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import FastDummyVecEnv
from sb3_clipvf.envs.envpool import EnvPoolVecEnv, SparedEnvPoolVecEnv
from sb3_clipvf.envs.gymnasium_vector import AtariVecEnv, CartPoleVecEnv, SeparateVecEnv
from sb3_clipvf.zoo import main, register
from sb3_clipvf.zoo.experiment import ClipPPOExperimentManager
from sb3_clipvf.zoo.training_curve import read_training_curve
from sb3_clipvf.zoo.vec_env import EnvSettings, make_vec_env, wrapper_list

pytestmark = [
    # Gymnasium, of EnvPool's spaces.
    pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning"),
]

register()

ENTRY: dict[str, Any] = {"policy": "MlpPolicy", "n_timesteps": 64, "n_envs": 2, "n_steps": 16, "batch_size": 32}
ATARI: dict[str, Any] = {
    **ENTRY,
    "policy": "CnnPolicy",
    "frame_stack": 4,
    "env_wrapper": [{"stable_baselines3.common.atari_wrappers.AtariWrapper": {"noop_max": 3}}],
}


class Halved(VecEnvWrapper):
    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards / 2, dones, infos


def _settings(tmp_path: Path, env_id: str, entry: dict[str, Any]) -> str:
    path = tmp_path / "settings.yml"
    path.write_text(yaml.safe_dump({env_id: entry}))
    return str(path)


def _train(tmp_path: Path, vec_env: str, env_id: str, entry: dict[str, Any], *more: str) -> int:
    config = _settings(tmp_path, env_id, entry)
    options = (
        f"--env {env_id} --vec-env {vec_env} --conf-file {config} --seed 1 --device cpu --verbose 0 --eval-freq -1"
    )
    return main(["train", *options.split(), "-f", str(tmp_path / "logs"), *more])


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Build the training and an evaluation environment from settings, as the manager does."""
    made = []

    def make_envs(vec_env: str | None, env_id: str, entry: dict[str, Any]) -> tuple[Any, Any]:
        monkeypatch.setattr(ClipPPOExperimentManager, "vec_env", vec_env)
        config = _settings(tmp_path, env_id, entry)
        manager = ClipPPOExperimentManager(
            Namespace(vec_env="dummy"), "clipppo", env_id, str(tmp_path / "logs"), config=config, verbose=0, seed=3
        )
        hyperparams, _ = manager.read_hyperparameters()
        _, manager.env_wrapper, _, manager.vec_env_wrapper = manager._preprocess_hyperparams(hyperparams)
        made.extend([manager.create_envs(2, no_log=True), manager.create_envs(1, eval_env=True)])
        return made[-2], made[-1]

    yield make_envs
    for env in made:
        env.close()


class TestTraining:
    @pytest.mark.parametrize(("vec_env", "cls"), [("gymnasium", CartPoleVecEnv), ("envpool", SparedEnvPoolVecEnv)])
    def test_end_to_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vec_env: str, cls: type[Any]) -> None:
        if vec_env == "envpool":
            pytest.importorskip("envpool")
        used, ends = [], []
        learn, step_wait = ClipPPO.learn, cls.step_wait

        def counted(self: Any) -> Any:
            counted.steps += self.num_envs  # type: ignore[attr-defined]
            returned = step_wait(self)
            ends.extend(counted.steps for info in returned[3] if "episode" in info)  # type: ignore[attr-defined]
            return returned

        counted.steps = 0  # type: ignore[attr-defined]
        monkeypatch.setattr(cls, "step_wait", counted)

        def spied(self: ClipPPO, *args: Any, **kwargs: Any) -> Any:
            used.append(type(self.env.unwrapped))
            return learn(self, *args, **kwargs)

        monkeypatch.setattr(ClipPPO, "learn", spied)
        assert _train(tmp_path, vec_env, "CartPole-v1", {**ENTRY, "n_timesteps": 256}, "--eval-freq", "128") == 0
        assert used == [cls]
        run = tmp_path / "logs" / "clipppo" / "CartPole-v1_1"
        # Random play lasts some 20 steps.
        assert len(load_results(str(run))) >= 5
        assert read_training_curve(run, 256).steps.tolist() == ends
        assert f"- {vec_env}\n" in (run / "CartPole-v1" / "args.yml").read_text()
        assert (run / "evaluations.npz").is_file()
        # The model continues in the Zoo's own environments.
        ClipPPO.load(run / "CartPole-v1.zip", env=DummyVecEnv([lambda: gym.make("CartPole-v1")]), device="cpu")
        # And nothing of the choice is left for the next command of this process.
        assert ClipPPOExperimentManager.vec_env is None
        assert _train(tmp_path, "dummy", "CartPole-v1", ENTRY) == 0
        assert used == [cls, FastDummyVecEnv]

    def test_help_names_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--help"]) == 0
        assert "--vec-env {dummy,subproc,gymnasium,envpool,ale}" in capsys.readouterr().out


class TestSettings:
    def test_normalize_stack_and_vec_wrapper_apply(self, make: Callable[..., Any]) -> None:
        pytest.importorskip("envpool")
        entry = {**ENTRY, "normalize": True, "frame_stack": 2, "vec_env_wrapper": f"{__name__}.Halved"}
        train, evaluation = make("envpool", "Pendulum-v1", entry)
        wrappers = [train, train.venv, train.venv.venv, train.venv.venv.venv]
        for wrapper, cls in zip(wrappers, (VecFrameStack, VecNormalize, Halved, SparedEnvPoolVecEnv), strict=True):
            assert isinstance(wrapper, cls)
        assert train.observation_space == evaluation.observation_space
        assert type(evaluation.unwrapped) is FastDummyVecEnv

    def test_a_model_of_mujoco_loads_with_gymnasium_again(self, make: Callable[..., Any]) -> None:
        pytest.importorskip("envpool")
        pytest.importorskip("mujoco")
        train, evaluation = make("envpool", "HalfCheetah-v5", ENTRY)
        # EnvPool's own actions are float64.
        assert train.action_space == evaluation.action_space == gym.make("HalfCheetah-v5").action_space
        assert train.observation_space == evaluation.observation_space
        obs = train.reset()
        assert obs.dtype == train.observation_space.dtype
        train.step(np.stack([train.action_space.sample() for _ in range(2)]))

    def test_seed_reaches_the_pool(self, make: Callable[..., Any]) -> None:
        envpool = pytest.importorskip("envpool")
        train, _ = make("envpool", "CartPole-v1", ENTRY)
        pool = envpool.make_gymnasium("CartPole-v1", num_envs=2, seed=3)
        np.testing.assert_array_equal(train.reset(), pool.reset()[0])
        pool.close()

    def test_gymnasium_keeps_wrappers_and_arguments_of_single_environments(self, make: Callable[..., Any]) -> None:
        entry = {**ENTRY, "env_wrapper": [{"rl_zoo3.wrappers.HistoryWrapper": {"horizon": 2}}]}
        train, evaluation = make("gymnasium", "Pendulum-v1", entry)
        assert isinstance(train, SeparateVecEnv)
        assert train.observation_space == evaluation.observation_space
        assert train.observation_space.shape == (8,)
        kwargs = {"env_kwargs": {"g": 5.0}}
        train, _ = make("gymnasium", "Pendulum-v1", {**ENTRY, **kwargs})
        assert train.get_attr("g") == [5.0, 5.0]

    def test_gymnasium_gives_the_same_steps_as_the_zoo(self, make: Callable[..., Any]) -> None:
        train, _ = make("gymnasium", "Pendulum-v1", ENTRY)
        reference, _ = make(None, "Pendulum-v1", ENTRY)
        assert isinstance(reference, DummyVecEnv)
        np.testing.assert_array_equal(train.reset(), reference.reset())
        actions = np.ones((2, 1), np.float32)
        for _ in range(201):
            got, expected = train.step(actions), reference.step(actions)
            for ours, theirs in zip(got[:3], expected[:3], strict=True):
                np.testing.assert_array_equal(ours, theirs)

    def test_a_class_that_cannot_reset_single_environments_is_not_used(self) -> None:
        # Only the spec matters: JAX may be missing.
        env_fns = [lambda: gym.make("CartPole-v1")] * 2
        for name, cls in (("phys2d/CartPole-v1", SeparateVecEnv), ("CartPole-v1", CartPoleVecEnv)):
            venv = make_vec_env("gymnasium", EnvSettings(gym.spec(name)), env_fns)
            assert type(venv) is cls
            venv.close()

    @pytest.mark.parametrize(("vec_env", "cls"), [("envpool", EnvPoolVecEnv), ("ale", AtariVecEnv)])
    def test_atari(self, make: Callable[..., Any], vec_env: str, cls: type[Any]) -> None:
        pytest.importorskip("ale_py")
        pytest.importorskip("cv2")
        if vec_env == "envpool":
            pytest.importorskip("envpool")
        train, evaluation = make(vec_env, "BreakoutNoFrameskip-v4", ATARI)
        assert isinstance(train, cls)
        # One policy serves both: the Zoo stacks and transposes for the evaluation, the pool does it itself.
        assert train.observation_space == evaluation.observation_space
        assert train.observation_space.shape == (4, 84, 84)
        assert train.action_space == evaluation.action_space
        train.reset()
        _, rewards, _, _ = train.step(np.array([1, 1]))
        assert rewards.dtype == np.float32
        if vec_env == "envpool":
            config = train.env.config
            assert (config["noop_max"], config["frame_skip"], config["stack_num"]) == (3, 4, 4)
            assert (config["episodic_life"], config["reward_clip"], config["max_episode_steps"]) == (True, True, 27000)
        else:
            assert train.clip_rewards

    def test_wrapper_list(self) -> None:
        name = "stable_baselines3.common.atari_wrappers.AtariWrapper"
        assert wrapper_list(None) == ()
        assert wrapper_list(name) == ((name, {}),)
        assert wrapper_list([{name: {"noop_max": 3}}, AtariWrapper]) == ((name, {"noop_max": 3}), (name, {}))


class TestRefusals:
    @pytest.mark.parametrize(
        ("vec_env", "env_id", "change", "message"),
        [
            ("ale", "CartPole-v1", {}, "must be an Atari game with `--vec-env ale`, got CartPole-v1"),
            ("envpool", "Pendulum-v1", {"env_kwargs": {"g": 5.0}}, "`env_kwargs` must be empty"),
            ("envpool", "Pendulum-v1", {"monitor_kwargs": {"info_keywords": ["a"]}}, "`monitor_kwargs` must be empty"),
            (
                "envpool",
                "Pendulum-v1",
                {"env_wrapper": [{"rl_zoo3.wrappers.HistoryWrapper": {"horizon": 2}}]},
                "`env_wrapper` must be empty with `--vec-env envpool`, got rl_zoo3.wrappers.HistoryWrapper",
            ),
            ("envpool", "CartPole-v8", {}, "not found in gym registry"),
            (
                "nothing",
                "CartPole-v1",
                {},
                "`--vec-env` must be one of 'dummy', 'subproc', 'gymnasium'",
            ),
        ],
    )
    def test_on_the_command_line(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        vec_env: str,
        env_id: str,
        change: dict[str, Any],
        message: str,
    ) -> None:
        if vec_env == "envpool":
            pytest.importorskip("envpool")
        assert _train(tmp_path, vec_env, env_id, {**ENTRY, **change}) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "logs" / "clipppo" / f"{env_id}_1").exists()

    def test_of_a_task_that_envpool_lacks(self) -> None:
        pytest.importorskip("envpool")
        gym.register("CartPole-v77", entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv")
        try:
            with pytest.raises(
                ValueError, match=r"must be a task of EnvPool .*got CartPole-v77. The nearest is CartPole"
            ):
                make_vec_env("envpool", EnvSettings(gym.spec("CartPole-v77")), [lambda: gym.make("CartPole-v77")])
        finally:
            del gym.registry["CartPole-v77"]

    def test_of_a_task_with_other_observations(self) -> None:
        pytest.importorskip("envpool")
        pytest.importorskip("mujoco")
        name = "CartPole-v1"
        spec = gym.spec(name)
        before = spec.entry_point
        try:
            spec.entry_point = "gymnasium.envs.classic_control.acrobot:AcrobotEnv"
            with pytest.raises(ValueError, match="must have the same action space in EnvPool and Gymnasium"):
                make_vec_env("envpool", EnvSettings(spec), [lambda: gym.make(name)])
        finally:
            spec.entry_point = before

    def test_of_a_missing_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import importlib.util

        find_spec = importlib.util.find_spec
        monkeypatch.setitem(sys.modules, "envpool", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "envpool" else find_spec(name))
        assert _train(tmp_path, "envpool", "CartPole-v1", ENTRY) == 2
        assert "Run `pip install 'sb3_clipvf[envpool]'`" in capsys.readouterr().err

    @pytest.mark.parametrize("vec_env", ["envpool", "ale"])
    @pytest.mark.parametrize(
        ("env_id", "change", "message"),
        [
            ("BreakoutNoFrameskip-v4", {"wrappers": ()}, "AtariWrapper alone .*got none"),
            (
                "BreakoutNoFrameskip-v4",
                {"wrappers": (("gymnasium.wrappers.GrayscaleObservation", {}),)},
                "AtariWrapper alone .*got gymnasium.wrappers.GrayscaleObservation",
            ),
            ("ALE/Breakout-v5", {}, "must be a game without frame skip .*got ALE/Breakout-v5"),
            (
                "BreakoutNoFrameskip-v4",
                {"normalize": True},
                "`normalize` must be left out for Atari games .*, got True",
            ),
            (
                "BreakoutNoFrameskip-v0",
                {"wrappers": wrapper_list([{AtariWrapper: {"action_repeat_probability": 0.1}}])},
                "`action_repeat_probability` must be 0 for BreakoutNoFrameskip-v0",
            ),
        ],
    )
    def test_of_atari_settings(self, vec_env: str, env_id: str, change: dict[str, Any], message: str) -> None:
        pytest.importorskip("ale_py")
        settings = EnvSettings(gym.spec(env_id), **{"wrappers": wrapper_list(AtariWrapper), **change})
        with pytest.raises(ValueError, match=message):
            make_vec_env(vec_env, settings, [lambda: gym.make(env_id)])
