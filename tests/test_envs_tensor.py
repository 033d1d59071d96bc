"""Tensor environments: their checks, SB3's VecEnv over them, lazy infos, and the statistics of episodes."""

from types import MappingProxyType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from tensor_cases import DICT, TensorWalk, tensor_pendulum

from sb3_clipvf import ClipPPO
from sb3_clipvf.engines.device_buffer import DeviceRolloutBuffer
from sb3_clipvf.envs import TensorVecEnv, TensorVecNormalize, as_vec_env
from sb3_clipvf.envs.tensor import (
    LazyInfos,
    TensorEnvAdapter,
    TensorStep,
    host_copy,
    host_infos,
    is_same_device,
    is_tensor_vec_env,
)
from sb3_clipvf.envs.tensor_episodes import finished_episodes


def test_a_class_with_the_methods_is_a_tensor_environment() -> None:
    assert isinstance(TensorWalk(), TensorVecEnv)
    assert not isinstance(gym.make("CartPole-v1"), TensorVecEnv)
    env = as_vec_env(TensorWalk())
    assert type(env) is TensorEnvAdapter and isinstance(env, TensorVecEnv)
    assert (env.num_envs, env.render_mode, env.env_is_wrapped(Monitor)) == (6, None, [True] * 6)


class UnreadableSpaces(TensorWalk):
    """Fails when its spaces are read."""

    observation_space = action_space = property(lambda self: pytest.fail("a space was read"))  # type: ignore[assignment]

    def __init__(self) -> None:
        self.num_envs = 1


def test_spaces_of_other_environments_are_not_read() -> None:
    env = UnreadableSpaces()
    assert not hasattr(env, "device")
    assert not is_tensor_vec_env(env)


def test_steps_on_the_host_are_those_of_a_vec_env() -> None:
    env = as_vec_env(TensorWalk(3))
    first = env.reset()
    assert first.tolist() == [[0.5, 0.0, 0.0], [0.5, 0.0, pytest.approx(1 / 3)], [0.5, 0.0, pytest.approx(2 / 3)]]
    actions = np.full((3, 2), 0.25, np.float32)
    obs, rewards, dones, infos = env.step(actions)
    assert obs[:, 0].tolist() == [0.75] * 3 and rewards.tolist() == [-0.75] * 3 and not dones.any()
    assert rewards.dtype == np.float32 and dones.dtype == np.bool_
    assert infos[1] == {"TimeLimit.truncated": False, "position": 0.75, "height": 3.0}
    # Row 0 is truncated after two steps.
    later, rewards, dones, infos = env.step(actions)
    assert obs[:, 0].tolist() == [0.75] * 3  # not overwritten
    assert later[:, 0].tolist() == [0.5, 1.0, 1.0] and dones.tolist() == [True, False, False]
    assert infos[0]["TimeLimit.truncated"] and infos[0]["terminal_observation"].tolist() == [1.0, 2.0, 0.0]
    assert (infos[0]["episode"]["r"], infos[0]["episode"]["l"]) == (-1.75, 2)
    # Row 1 terminates after three.
    _, _, dones, infos = env.step(actions)
    assert dones.tolist() == [False, True, False] and not infos[1]["TimeLimit.truncated"]


def test_a_seed_is_that_of_all_environments_at_the_next_reset() -> None:
    env = as_vec_env(TensorWalk(2))
    env.seed(7)
    assert env.reset()[:, 0].tolist() == [np.float32(0.07)] * 2
    assert env.reset()[:, 0].tolist() == [0.5] * 2
    env.set_options({"x": 1})
    with pytest.raises(ValueError, match="`options` must be empty"):
        env.reset()


def test_rewards_are_clipped_for_the_algorithm_only() -> None:
    env = as_vec_env(TensorWalk(2), clip_rewards=True)
    env.reset()
    assert env.step(np.zeros((2, 2)))[1].tolist() == [-1.0, -1.0]
    step = env.step_tensors(th.zeros(2, 2))
    assert step.rewards.tolist() == [-1.0, -1.0] and env.true_rewards.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("reward", [np.inf, -np.inf, np.nan])
def test_clipping_hides_no_rewards_that_are_not_finite(reward: float) -> None:
    env = as_vec_env(Wrong(rewards=th.tensor([0.5, reward, -3.0, 0.0])), clip_rewards=True)
    env.reset()
    expected = [1.0, reward, -1.0, 0.0]
    np.testing.assert_array_equal(env.step_tensors(th.zeros(4, 2)).rewards, expected)
    np.testing.assert_array_equal(env.step(np.zeros((4, 2)))[1], expected)


def test_the_host_writes_a_file_of_statistics(tmp_path: Any) -> None:
    env = as_vec_env(TensorWalk(2), monitor_path=tmp_path / "walk")
    ClipPPO("MlpPolicy", env, n_steps=4, batch_size=8, device="cpu").learn(8)
    assert load_results(str(tmp_path))["l"].tolist() == [2, 3, 2]
    env.close()
    assert env.env.closed


@pytest.mark.parametrize("finals", [True, False])
def test_lazy_infos_are_those_of_steps_on_the_host(finals: bool) -> None:
    first, second = TensorWalk(4, DICT, finals=finals), as_vec_env(TensorWalk(4, DICT, finals=finals))
    first.reset_tensors()
    second.reset()
    for _ in range(5):
        actions = th.full((4, 2), 0.1)
        step = first.step_tensors(actions)
        lazy, expected = LazyInfos(step, 4), second.step(actions.numpy())[3]
        assert len(lazy) == 4 and lazy[0] is lazy[0]
        for row, (info, wanted) in enumerate(zip(lazy, expected, strict=True)):
            wanted.pop("episode", None)
            assert info.keys() == wanted.keys(), row
            final, wanted_final = info.pop("terminal_observation", {}), wanted.pop("terminal_observation", {})
            assert info == wanted
            for key in wanted_final:
                np.testing.assert_array_equal(final[key], wanted_final[key])


def test_nested_infos_have_one_row_for_each_environment() -> None:
    log: dict[Any, Any] = {"speed": th.tensor([1.0, 2.0]), "mean": th.tensor(1.5), 3: th.tensor([5, 6])}
    log["parts"] = (th.tensor([3, 4]), "text")
    assert host_infos({"log": log})["log"]["mean"] == 1.5
    env = as_vec_env(Wrong(num_envs=2, infos={"log": log, "is_success": th.tensor([True, False])}))
    env.reset()
    for infos in (env.step(np.zeros((2, 2)))[3], LazyInfos(env.env.step_tensors(th.zeros(2, 2)), 2)):
        assert [info["log"]["speed"] for info in infos] == [1.0, 2.0]
        assert [info["log"][3] for info in infos] == [5, 6]
        assert infos[0]["log"]["mean"] == 1.5 and infos[1]["is_success"] is False
        assert isinstance(infos[0]["log"]["parts"][0], np.ndarray)


@pytest.mark.parametrize("current", [0, 1])
def test_a_device_without_an_index_is_the_current_one(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.cuda, "current_device", lambda: current)
    for index in (0, 1):
        assert is_same_device(th.device("cuda"), th.device("cuda", index)) == (index == current)
    assert is_same_device(th.device("cpu"), th.device("cpu", 0)) and is_same_device(
        th.device("meta"), th.device("meta")
    )
    assert not is_same_device(th.device("cpu"), th.device("cuda"))


class Wrong(TensorWalk):
    """Returns steps with other values."""

    def __init__(self, num_envs: int = 4, **values: Any) -> None:
        super().__init__(num_envs)
        self.values = values

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        return super().step_tensors(actions)._replace(**self.values)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"observations": th.zeros(4, 2)}, ValueError, r"observations of shape \(4, 3\).*got \(4, 2\)"),
        ({"observations": th.zeros(4, 3, dtype=th.float64)}, ValueError, "torch.float32, on cpu, got .*float64"),
        ({"observations": th.zeros(4, 3, device="meta")}, ValueError, "on cpu, got .* on meta"),
        ({"observations": np.zeros((4, 3), np.float32)}, TypeError, "observations as a tensor, got .*ndarray"),
        ({"final_observations": th.zeros(1, 3)}, ValueError, r"observations of shape \(4, 3\).*got \(1, 3\)"),
        ({"rewards": th.zeros(4, 1)}, ValueError, r"rewards of shape \(4,\), floating point.*got \(4, 1\)"),
        ({"rewards": th.zeros(4, dtype=th.int64)}, ValueError, "rewards .* floating point.*int64"),
        ({"terminated": th.zeros(4)}, ValueError, "terminated .* torch.bool.*float32"),
        ({"truncated": th.zeros(4, 1, dtype=th.bool)}, ValueError, r"truncated .*got \(4, 1\)"),
        ({"infos": [{}] * 4}, TypeError, "infos as a dict, got a value of type list"),
    ],
)
def test_wrong_steps_are_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    env = as_vec_env(Wrong(**values))
    env.reset()
    with pytest.raises(error, match=f"`step_tensors` must return .*{message}"):
        env.step_tensors(th.zeros(4, 2))


def test_observations_without_a_key_are_refused() -> None:
    env = as_vec_env(TensorWalk(4, DICT))
    env.env.reset_tensors = lambda seed: {"vector": th.zeros(4, 3)}
    with pytest.raises(TypeError, match="`reset_tensors` must return a dict of tensors .* without 'image'"):
        env.reset()


class MappedWalk(TensorWalk):
    """Returns observations in a mapping that is no dict, and that has a key of its own."""

    def _returned(self, observations: Any) -> Any:
        return MappingProxyType(observations | {"own": 0})

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        step = super().step_tensors(actions)
        return step._replace(final_observations=self._returned(step.final_observations))


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
@pytest.mark.parametrize("wrap", [as_vec_env, lambda env: TensorVecNormalize(env, norm_obs_keys=["vector"])])
def test_mappings_of_other_classes_are_dicts(wrap: Any, buffer: Any) -> None:
    weights = []
    for cls in (TensorWalk, MappedWalk):
        env = wrap(cls(observation_space=DICT))
        model = ClipPPO("MultiInputPolicy", env, n_steps=4, batch_size=24, n_epochs=1, device="cpu", seed=0,
                        rollout_buffer_class=buffer).learn(24)  # fmt: skip
        weights.append(th.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
    assert th.equal(*weights)


@pytest.mark.parametrize("seed", range(3))
def test_statistics_of_episodes_are_those_of_a_loop(seed: int) -> None:
    generator = np.random.default_rng(seed)
    returns, lengths = generator.normal(size=5), generator.integers(0, 9, 5)
    expected: list[tuple[float, int]] = []
    wanted_returns, wanted_lengths = returns.copy(), lengths.copy()
    for _ in range(4):
        rewards = generator.normal(size=(7, 5)).astype(np.float32)
        dones = generator.random((7, 5)) < 0.3
        for reward, done in zip(rewards, dones, strict=True):
            wanted_returns += reward
            wanted_lengths += 1
            for row in np.flatnonzero(done):
                expected.append((wanted_returns[row], wanted_lengths[row]))
                wanted_returns[row], wanted_lengths[row] = 0.0, 0
        *ended, returns, lengths = finished_episodes(th.from_numpy(rewards), th.from_numpy(dones), returns, lengths)
        wanted = expected[-dones.sum() :] if dones.any() else []
        np.testing.assert_allclose(ended[0], [total for total, _ in wanted], atol=1e-12)
        assert ended[1].tolist() == [length for _, length in wanted]
    np.testing.assert_allclose(returns, wanted_returns, atol=1e-12)
    assert lengths.tolist() == wanted_lengths.tolist()
    assert len(expected) > 20


def test_the_tensor_pendulum_is_gymnasiums() -> None:
    env = tensor_pendulum().TensorPendulum(3, time_limit=200)
    observations = env.reset_tensors(seed=1)
    singles = [gym.make("Pendulum-v1") for _ in range(3)]
    for single, angle, speed in zip(singles, env.angles, env.speeds, strict=True):
        single.reset(seed=0)
        single.unwrapped.state = np.array([float(angle), float(speed)])
    generator = np.random.default_rng(0)
    for _ in range(200):
        actions = generator.uniform(-2.5, 2.5, (3, 1)).astype(np.float32)
        step = env.step_tensors(th.from_numpy(actions))
        for row, single in enumerate(singles):
            expected, reward, terminated, truncated, _ = single.step(actions[row])
            # Gymnasium computes in float64. A swing amplifies the rounding of float32.
            np.testing.assert_allclose(step.final_observations[row], expected, atol=2e-3)
            assert float(step.rewards[row]) == pytest.approx(reward, abs=2e-2)
            assert (bool(step.terminated[row]), bool(step.truncated[row])) == (terminated, truncated)
            # The next step starts from the same state.
            if not truncated:
                single.unwrapped.state = np.array([float(env.angles[row]), float(env.speeds[row])])
    assert step.truncated.all()
    assert not th.equal(step.observations, step.final_observations)
    assert not th.equal(env.reset_tensors(seed=1), env.reset_tensors()) and th.equal(
        env.reset_tensors(seed=1), observations
    )


def test_sb3_evaluates_a_policy_in_it() -> None:
    model = ClipPPO("MlpPolicy", TensorWalk(), n_steps=4, batch_size=8, device="cpu", seed=0)
    returns, lengths = evaluate_policy(model, as_vec_env(TensorWalk()), 12, return_episode_rewards=True)
    assert sorted(set(lengths)) == [2, 3, 4] and np.all(np.asarray(returns) < 0)


def test_host_copies_share_no_memory() -> None:
    tensor = th.zeros(2)
    copied = host_copy({"a": tensor})
    tensor += 1
    assert copied["a"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16, th.float64])
def test_rewards_of_every_float_reach_the_host(dtype: th.dtype) -> None:
    env = as_vec_env(Wrong(rewards=th.full((4,), 0.5, dtype=dtype), infos={"height": th.ones(4, dtype=dtype)}))
    env.reset()
    _, rewards, _, infos = env.step(np.zeros((4, 2), np.float32))
    np.testing.assert_array_equal(rewards, np.full(4, 0.5, np.float32), strict=True)
    assert infos[3]["height"] == 1.0
