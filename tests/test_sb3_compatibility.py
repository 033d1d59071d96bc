"""Compatibility with SB3: environments and files on which its own PPO fails, and what its tools rely on."""

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize

from sb3_clipvf import ClipPPO, TensorRolloutBuffer
from sb3_clipvf.collection import bootstrap_truncated
from sb3_clipvf.engines.autograd import AutogradEngine

N_STEPS = 12


class Counter(gym.Env[np.ndarray, Any]):
    """Counts to three; the observation is the count, in the given dtype."""

    def __init__(self, dtype: Any = np.float32, action_space: spaces.Space[Any] | None = None) -> None:
        self.observation_space = spaces.Box(0, 9, (2,), dtype)
        self.action_space = action_space or spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.count = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return self._observe(), 1.0, self.count == 3, False, {}

    def _observe(self) -> np.ndarray:
        return np.full(2, self.count, self.observation_space.dtype)


class SameArrays(VecEnvWrapper):
    """Writes each step into the arrays of the step before, as environments in C do."""

    def reset(self) -> Any:
        self.obs, self.dones = self.venv.reset().copy(), np.zeros(self.num_envs, bool)
        return self.obs

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        self.obs[:], self.dones[:] = obs, dones
        return self.obs, rewards, self.dones, infos


def make(env: Any, **kwargs: Any) -> ClipPPO:
    return ClipPPO("MlpPolicy", env, n_steps=N_STEPS, batch_size=6, n_epochs=1, clip_range=0.2, seed=0, **kwargs)


def test_a_vec_env_may_write_into_the_same_arrays() -> None:
    model = make(SameArrays(DummyVecEnv([Counter])))
    model.learn(N_STEPS)
    assert model.rollout_buffer.episode_starts[:, 0].tolist() == [1, 0, 0] * 4
    assert model.rollout_buffer.observations[:, 0, 0].tolist() == [0, 1, 2] * 4


def test_normalised_integer_observations_are_stored_as_floats() -> None:
    model = make(VecNormalize(DummyVecEnv([lambda: Counter(np.uint8)])))
    seen: list[np.ndarray] = []
    model.learn(N_STEPS, callback=lambda local, _: seen.append(local["obs_tensor"].numpy().copy()) is None)
    assert model.rollout_buffer.observations.dtype == np.float32
    np.testing.assert_array_equal(model.rollout_buffer.observations, np.stack(seen).astype(np.float32))


def test_images_that_are_not_normalised_keep_their_dtype() -> None:
    model = make(VecNormalize(DummyVecEnv([lambda: Counter(np.uint8)]), norm_obs=False))
    model.learn(N_STEPS)
    assert model.rollout_buffer.observations.dtype == np.uint8


def test_integer_rewards_can_be_bootstrapped() -> None:
    policy = make(DummyVecEnv([Counter])).policy
    infos = [{"TimeLimit.truncated": True, "terminal_observation": np.ones(2, np.float32)}]
    rewards = np.array([1])
    engine = AutogradEngine(policy, None)  # type: ignore[arg-type]
    got = bootstrap_truncated(engine, rewards, np.array([True]), infos, gamma=0.5, values=np.zeros(1))
    value = policy.predict_values(th.ones(1, 2)).item()
    np.testing.assert_allclose(got, [1 + 0.5 * value], rtol=1e-6)  # float32 rounding
    assert rewards.tolist() == [1]


def test_the_policys_float_actions_survive_an_integer_box() -> None:
    env = DummyVecEnv([lambda: Counter(action_space=spaces.Box(0, 10, (1,), np.int64))])
    model = make(env, learning_rate=0.0)
    model.learn(N_STEPS)
    assert model.logger.name_to_value["train/ratio_max"] == pytest.approx(1, abs=1e-5)  # float32 rounding


def test_actions_that_do_not_count_from_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="`env` must count its discrete actions from 0, got Discrete"):
        make(DummyVecEnv([lambda: Counter(action_space=spaces.Discrete(2, start=5))]))


def test_after_a_callback_stopped_the_model_has_the_environments_observation() -> None:
    model = make(DummyVecEnv([Counter]))
    model.learn(N_STEPS, callback=lambda local, _: local["n_steps"] < 1)
    assert model._last_obs is not None
    assert float(np.asarray(model._last_obs)[0, 0]) == model.env.envs[0].unwrapped.count  # type: ignore[union-attr]


@pytest.mark.parametrize("arguments", [{"lr_kl_target": 0.01}, {"kl_coef": 1.0, "adaptive_kl_target": 0.01}, {}])
def test_the_zoos_replacements_at_load_are_accepted(arguments: dict[str, Any], tmp_path: Any) -> None:
    make(DummyVecEnv([Counter]), **arguments).save(tmp_path / "model")
    zoo = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    model = ClipPPO.load(tmp_path / "model", custom_objects=zoo)
    assert model.predict(np.zeros(2, np.float32))[0] in (0, 1)


def test_passing_what_the_file_holds_keeps_the_controllers_state(tmp_path: Any) -> None:
    model = make(DummyVecEnv([Counter]), kl_coef=1.0, adaptive_kl_target=0.01)
    assert model.adaptive_kl is not None
    model.adaptive_kl = model.adaptive_kl.next(1.0)
    model.save(tmp_path / "model")
    betas = []
    for kwargs in ({}, {"kl_coef": 1.0}, {"kl_coef": 3.0}, {"custom_objects": {"kl_coef": 5.0}}):
        state = ClipPPO.load(tmp_path / "model", **kwargs).adaptive_kl
        assert state is not None
        betas.append(state.beta)
    assert betas == [2.0, 2.0, 3.0, 5.0]


def test_a_warning_names_the_arguments_that_another_algorithms_file_lacks(tmp_path: Any) -> None:
    A2C("MlpPolicy", DummyVecEnv([Counter]), device="cpu").save(tmp_path / "a2c")
    with pytest.warns(UserWarning, match="clip_range=0.2, clip_range_vf=None"):
        model = ClipPPO.load(tmp_path / "a2c", device="cpu")
    assert (model.clip_range, model.clip_range_vf) == (0.2, None)


@pytest.mark.parametrize(("window", "kept"), [(2, 2), (7, 4), (None, 4)])
def test_the_window_of_episodes_may_change_at_load(window: int | None, kept: int, tmp_path: Any) -> None:
    env = DummyVecEnv([lambda: Monitor(Counter())])
    model = make(env, engine="autograd").learn(N_STEPS)
    model.save(tmp_path / "model")
    loaded = ClipPPO.load(tmp_path / "model", env, stats_window_size=window)
    assert list(loaded.ep_info_buffer or ()) == list(model.ep_info_buffer or ())[-kept:]
    loaded.learn(8 * N_STEPS, reset_num_timesteps=False)
    assert len(loaded.ep_info_buffer or ()) == (window or 9 * N_STEPS // 3)


def test_load_refuses_a_misspelt_argument(tmp_path: Any) -> None:
    make(DummyVecEnv([Counter])).save(tmp_path / "model")
    with pytest.raises(TypeError, match="`policy` must not be passed to `load`, got 'CnnPolicy'.*Pass `policy_class`"):
        ClipPPO.load(tmp_path / "model", policy="CnnPolicy")
    with pytest.raises(TypeError, match="`_init_setup_model` must be an argument of ClipPPO"):
        ClipPPO.load(tmp_path / "model", _init_setup_model=False)
    with pytest.raises(TypeError, match="`policy_class` must be a class derived .*'MlpPolicy'. Pass the class itself"):
        ClipPPO.load(tmp_path / "model", policy_class="MlpPolicy")
    with pytest.raises(TypeError, match=r"`clip_rnage` must be an argument of ClipPPO.*Did you mean 'clip_range'"):
        ClipPPO.load(tmp_path / "model", clip_rnage=1.0)

    class Own(ActorCriticPolicy):
        pass

    assert type(ClipPPO.load(tmp_path / "model", policy_class=Own).policy) is Own


@pytest.mark.parametrize(
    ("arguments", "attributes"),
    [
        ({"verbose": True, "normalize_advantage": 1}, {"verbose": 1, "normalize_advantage": True}),
        ({"use_sde": 0, "stats_window_size": None}, {"use_sde": False}),
        ({"rollout_buffer_class": partial(RolloutBuffer)}, {"rollout_buffer_class": None}),
    ],
)
def test_values_that_sb3_converts_are_read_from_its_files(
    arguments: dict[str, Any], attributes: dict[str, Any], tmp_path: Any
) -> None:
    sizes = {"n_steps": N_STEPS, "batch_size": N_STEPS}
    PPO("MlpPolicy", DummyVecEnv([Counter]), device="cpu", **sizes, **arguments).save(tmp_path / "ppo")
    with pytest.warns(UserWarning, match="not saved by ClipPPO"):
        model = ClipPPO.load(tmp_path / "ppo", DummyVecEnv([Counter]), "cpu", trust_pickle=[partial])
    assert {name: getattr(model, name) for name in attributes} == attributes
    model.learn(N_STEPS)


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 0.0), ("target_kl", 0.0), ("ent_coef", -0.1)])
def test_load_names_the_argument_that_replaces_a_refused_value(name: str, value: float, tmp_path: Any) -> None:
    PPO("MlpPolicy", DummyVecEnv([Counter]), device="cpu", **{name: value}).save(tmp_path / "ppo")
    with pytest.warns(UserWarning, match="not saved by ClipPPO"):
        with pytest.raises(ValueError, match=rf"`{name}` must be .* pass `{name}=\.\.\.` to `load`\.$"):
            ClipPPO.load(tmp_path / "ppo", device="cpu")
        with pytest.raises(ValueError, match=rf"`{name}` must be ") as caught:
            ClipPPO.load(tmp_path / "ppo", device="cpu", **{name: -1.0})
        assert "to `load`" not in str(caught.value)
        model = ClipPPO.load(tmp_path / "ppo", device="cpu", **{name: 0.5})
    assert getattr(model, name) == 0.5


@pytest.mark.parametrize("kwargs", [None, {"dist_param_dim": 0}])
def test_a_partial_of_a_buffer_class_passes_its_keywords(kwargs: dict[str, Any] | None) -> None:
    buffer_class = partial(TensorRolloutBuffer, dist_param_dim=2, gamma=0.1)
    model = make(DummyVecEnv([Counter]), rollout_buffer_class=buffer_class, rollout_buffer_kwargs=kwargs)
    assert model.rollout_buffer_class is TensorRolloutBuffer
    assert (model.rollout_buffer.dist_param_dim, model.rollout_buffer.gamma) == (0 if kwargs else 2, 0.99)
    model.learn(N_STEPS)


class Passing(ClipPPO):
    """Passes its arguments on, and has one of its own."""

    def __init__(self, *args: Any, bonus: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bonus = bonus


class Fixed(ClipPPO):
    """Sets its arguments itself."""

    def __init__(self, policy: Any, env: Any, device: Any = "cpu", _init_setup_model: bool = True) -> None:
        super().__init__(policy, env, gamma=0.9, device=device, _init_setup_model=_init_setup_model)


@pytest.mark.parametrize("cls", [Passing, Fixed])
def test_subclasses_load_with_all_arguments(cls: type[ClipPPO], tmp_path: Any) -> None:
    PPO("MlpPolicy", DummyVecEnv([Counter]), device="cpu").save(tmp_path / "ppo")
    with pytest.warns(UserWarning, match="The file was not saved by ClipPPO"):
        model = cls.load(tmp_path / "ppo", device="cpu", kl_coef=1.0, advantage_scope="rollout")
    assert (model.kl_coef, model.advantage_scope) == (1.0, "rollout")
    model.save(tmp_path / "model")
    if cls is Passing:
        assert cls.load(tmp_path / "model", device="cpu", bonus=2.0).bonus == 2.0  # type: ignore[attr-defined]
    for name in ("args", "kwargs", "monitor_wrapper", "policy"):
        with pytest.raises(TypeError, match=f"`{name}` must"):
            cls.load(tmp_path / "model", **{name: 1})


@pytest.mark.skipif(th.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_reported_once(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    model = make(DummyVecEnv([Counter]), device="cuda")
    assert model.device.type == "cpu"
    assert caplog.text.count("there is no CUDA device here: the CPU is used") == 1
    model.save(tmp_path / "model")
    caplog.clear()
    assert ClipPPO.load(tmp_path / "model", device="cuda").device.type == "cpu"
    assert caplog.text.count("there is no CUDA device here: the CPU is used") == 1
