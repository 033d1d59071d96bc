"""Adapters of simulators: a stand-in with the interface of Isaac Lab's environments, and environments in JAX."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_clipvf import ClipPPO
from sb3_clipvf.engines.device_buffer import DeviceRolloutBuffer
from sb3_clipvf.envs import IsaacLabTensorEnv, JaxTensorEnv, TensorVecEnv, as_vec_env
from sb3_clipvf.envs.isaac_lab import _bounded

SETTINGS: dict[str, Any] = {"n_steps": 8, "batch_size": 16, "n_epochs": 2, "seed": 3, "device": "cpu"}


class StandIn:
    """
    Shapes and types of Isaac Lab's ManagerBasedRLEnv, as its documentation describes them.

    ``single_observation_space`` is a dict by group, actions are unbounded, and ``device`` is a string.
    """

    num_envs, device = 4, "cpu"

    def __init__(self) -> None:
        box = spaces.Box(-np.inf, np.inf, (5,), np.float32)
        terms = spaces.Dict({"velocity": spaces.Box(-np.inf, np.inf, (3,), np.float32)})
        self.single_observation_space = spaces.Dict({"policy": box, "critic": terms})
        self.single_action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.generator = th.Generator()
        self.episode_length_buf = th.zeros(4, dtype=th.int64)
        self.received: list[th.Tensor] = []
        self.is_closed = False

    @property
    def unwrapped(self) -> "StandIn":
        return self

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed is not None:
            self.generator.manual_seed(seed)
        self.episode_length_buf.zero_()
        return self._observations(), {"log": {}}

    def step(self, action: th.Tensor) -> tuple[Any, ...]:
        self.received.append(action)
        self.episode_length_buf += 1
        time_outs = self.episode_length_buf >= th.tensor([3, 3, 99, 99])
        terminated = self.episode_length_buf >= th.tensor([99, 99, 2, 4])
        self.episode_length_buf[time_outs | terminated] = 0
        extras = {"log": {"Episode_Reward/alive": th.tensor(0.5)}, "time_outs": time_outs}
        return self._observations(), -action.square().sum(1), terminated, time_outs, extras

    def close(self) -> None:
        self.is_closed = True

    def _observations(self) -> dict[str, Any]:
        numbers = th.randn(4, 5, generator=self.generator)
        return {"policy": numbers, "critic": {"velocity": numbers[:, :3]}}


@pytest.mark.parametrize(("group", "policy"), [("policy", "MlpPolicy"), ("critic", "MultiInputPolicy")])
@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
def test_the_interface_of_isaac_lab_trains(group: str, policy: str, buffer: Any) -> None:
    stand_in = StandIn()
    env = IsaacLabTensorEnv(stand_in, group)
    assert isinstance(env, TensorVecEnv) and env.device == th.device("cpu")
    assert env.action_space == spaces.Box(-100.0, 100.0, (2,), np.float32)
    engine = "auto" if buffer is None else "autograd"
    model = ClipPPO(policy, env, engine=engine, rollout_buffer_class=buffer, gamma=0.9, **SETTINGS)
    model.learn(32 * 2)
    assert stand_in.received[0].dtype == th.float32 and stand_in.received[0].shape == (4, 2)
    assert {episode["l"] for episode in model.ep_info_buffer} == {2, 3, 4}
    # Truncated rows take the value of the observation before the last step, terminated ones do not.
    rewards = th.as_tensor(model.rollout_buffer.rewards)
    plain = th.stack([-actions.square().sum(1) for actions in stand_in.received[8:]])
    values = th.as_tensor(model.rollout_buffer.values)
    starts = th.cat([th.as_tensor(model.rollout_buffer.episode_starts)[1:], th.zeros(1, 4)])
    np.testing.assert_allclose((rewards - plain)[:7, :2], 0.9 * (starts * values)[:7, :2], atol=1e-5)
    np.testing.assert_allclose((rewards - plain)[:, 2:], 0.0, atol=1e-5)
    model.env.close()
    assert stand_in.is_closed


def test_infos_of_isaac_lab_can_be_read() -> None:
    env = as_vec_env(IsaacLabTensorEnv(StandIn()))
    env.seed(1)
    first = env.reset()
    env.seed(1)
    np.testing.assert_array_equal(first, env.reset())
    for _ in range(3):
        _, _, dones, infos = env.step(np.zeros((4, 2)))
    assert dones.tolist() == [True, True, False, False]
    assert infos[0]["TimeLimit.truncated"] and "terminal_observation" not in infos[0]
    assert infos[3]["log"] == {"Episode_Reward/alive": 0.5} and infos[0]["time_outs"]


def test_bounded_actions_keep_their_bounds() -> None:
    box = spaces.Box(-2.0, 3.0, (2,), np.float32)
    assert _bounded(box, 1.0) is box and _bounded(spaces.Discrete(2), 1.0) == spaces.Discrete(2)
    half = spaces.Box(np.float32([0.0, -np.inf]), np.float32([np.inf, 5.0]))
    assert _bounded(half, 7.0) == spaces.Box(np.float32([0.0, -7.0]), np.float32([7.0, 5.0]))


def test_finite_bounds_beyond_those_of_unbounded_actions_stay() -> None:
    mixed = spaces.Box(np.float32([-500.0, -np.inf, 2.0]), np.float32([500.0, -5.0, 2.0]))
    assert _bounded(mixed, 7.0) == spaces.Box(np.float32([-500.0, -7.0, 2.0]), np.float32([500.0, -5.0, 2.0]))
    with pytest.raises(ValueError, match="`action_bound` must be beyond all finite bounds .* got 5.0 for Box"):
        _bounded(mixed, 5.0)


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match="`group` must be one of .* 'critic', 'policy', got 'teacher'"):
        IsaacLabTensorEnv(StandIn(), "teacher")
    with pytest.raises(ValueError, match="`action_bound` must be finite and above 0"):
        IsaacLabTensorEnv(StandIn(), action_bound=0.0)


def test_jax_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jax", None)
    with pytest.raises(ImportError, match="needs JAX. Install it for your device"):
        JaxTensorEnv(object(), 4)


def walk_in_jax(physics: str) -> Any:
    """A walk on a line with the interface of Brax (``pipeline_state``) and Playground (``data``)."""
    jax = pytest.importorskip("jax")
    jnp = jax.numpy

    class State:
        """A state, as a tree of arrays with ``replace``."""

        names = (physics, "obs", "reward", "done", "metrics", "info")

        def __init__(self, **parts: Any) -> None:
            vars(self).update(parts)

        def replace(self, **parts: Any) -> "State":
            return State(**{**vars(self), **parts})

    def flat(state: State) -> Any:
        return [vars(state)[name] for name in State.names], None

    jax.tree_util.register_pytree_node(
        State, flat, lambda _, parts: State(**dict(zip(State.names, parts, strict=True)))
    )

    class Walk:
        action_size = 2

        def reset(self, key: Any) -> State:
            x = jax.random.uniform(key)
            zero = jnp.zeros(())
            parts = {physics: {"x": x, "n": zero}, "obs": jnp.stack([x, zero])}
            return State(**parts, reward=zero, done=zero, metrics={"x": x}, info={"key": key})

        def step(self, state: State, action: Any) -> State:
            now = vars(state)[physics]
            x, n = now["x"] + 0.1 * action.mean(), now["n"] + 1
            parts = {physics: {"x": x, "n": n}, "obs": jnp.stack([x, n]), "metrics": {"x": x}}
            return state.replace(**parts, reward=-jnp.abs(x), done=jnp.where(x > 1.2, 1.0, 0.0))

    return Walk()


@pytest.mark.parametrize("physics", ["pipeline_state", "data"])
def test_environments_in_jax_step_as_a_loop_does(physics: str) -> None:
    env = JaxTensorEnv(walk_in_jax(physics), 5, episode_length=3)
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (2,), np.float32)
    first = env.reset_tensors(seed=1).clone()
    x, n = first[:, 0].clone(), np.zeros(5)
    n_ended = 0
    for number in range(8):
        actions = th.full((5, 2), 0.9 if number % 2 else 0.3)
        step = env.step_tensors(actions)
        x, n = x + 0.1 * actions[:, 0], n + 1
        np.testing.assert_allclose(step.final_observations[:, 0], x, atol=1e-6)
        np.testing.assert_allclose(step.rewards, -x.abs(), atol=1e-6)
        assert step.terminated.tolist() == (x > 1.2).tolist() and step.truncated.tolist() == (n >= 3).tolist()
        ended = step.terminated | step.truncated
        x, n = th.where(ended, first[:, 0], x), np.where(ended, 0, n)
        np.testing.assert_allclose(step.observations, np.stack([x, n], 1), atol=1e-6)
        n_ended += int(ended.sum())
    assert n_ended > 5
    assert th.equal(first, env.reset_tensors(seed=1)) and not th.equal(first, env.reset_tensors())


def test_a_policy_trains_in_environments_of_jax() -> None:
    env = JaxTensorEnv(walk_in_jax("data"), 4, episode_length=3)
    model = ClipPPO("MlpPolicy", env, **SETTINGS)
    model.learn(32 * 2)
    assert {episode["l"] for episode in model.ep_info_buffer} <= {1, 2, 3} and model.num_timesteps == 64


def test_brax_itself_trains() -> None:
    envs = pytest.importorskip("brax.envs")
    env = JaxTensorEnv(envs.get_environment("fast"), 4, episode_length=3)
    model = ClipPPO("MlpPolicy", env, **SETTINGS)
    model.learn(32 * 2)
    assert {episode["l"] for episode in model.ep_info_buffer} == {3}
