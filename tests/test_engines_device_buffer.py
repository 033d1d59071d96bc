"""The rollout buffer on a device: the numbers of the one on the host, and its memory. ``cuda`` tests need a GPU."""

import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv
from tensor_cases import DICT, IMAGE, VECTOR, TensorWalk, tensor_pendulum

from sb3_clipvf import ClipPPO, TensorRolloutBuffer
from sb3_clipvf.common.nonfinite import NonFiniteError
from sb3_clipvf.engines import device_buffer
from sb3_clipvf.engines.device_buffer import DeviceRolloutBuffer, explained_variance_of
from sb3_clipvf.envs import FastDummyVecEnv, GraphedTensorEnv, TensorVecNormalize
from sb3_clipvf.rollout import gae, needs_complete_rollout

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")


def filled(kind: Any, space: spaces.Space[Any], action_space: spaces.Space[Any] = BOX, **more: Any) -> Any:
    """A rollout of 5 steps of 3 environments, of random numbers."""
    generator = np.random.default_rng(0)
    buffer = kind(5, space, action_space, n_envs=3, gamma=0.9, gae_lambda=0.8, dist_param_dim=4, **more)
    buffer.reset()
    for _ in range(5):
        obs: Any = {key: generator.integers(0, 99, (3, *part.shape)).astype(part.dtype) for key, part in
                    (space.spaces.items() if isinstance(space, spaces.Dict) else [("", space)])}  # fmt: skip
        actions = generator.integers(0, 2, (3, 2 if action_space is BOX else 1))
        numbers = generator.normal(size=(3, 3)).astype(np.float32)
        dist = generator.normal(size=(3, 4)).astype(np.float32)
        starts = generator.random(3) < 0.4
        buffer.add(
            obs if "" not in obs else obs[""], actions, numbers[0], starts, numbers[1][:, None], numbers[2], dist
        )
    buffer.compute_returns_and_advantage(th.tensor([[0.3], [0.1], [-0.2]]), np.array([True, False, False]))
    return buffer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])])
@pytest.mark.parametrize("action_space", [BOX, spaces.Discrete(2)], ids=["box", "discrete"])
@pytest.mark.parametrize("space", [VECTOR, IMAGE, DICT], ids=["vector", "image", "dict"])
def test_minibatches_are_those_of_the_buffer_on_the_host(space: Any, action_space: Any, device: str) -> None:
    host, ours = (
        filled(kind, space, action_space, device=device) for kind in (TensorRolloutBuffer, DeviceRolloutBuffer)
    )
    assert ours.values.device.type == device and ours.nbytes == host.nbytes
    addresses = ours.values.data_ptr(), ours.actions.data_ptr()
    for how in ("get", "in_order"):
        np.random.seed(1)
        expected = list(getattr(host, how)(4))
        np.random.seed(1)
        batches = list(getattr(ours, how)(4))
        assert [len(batch.returns) for batch in batches] == [4, 4, 4, 3]
        for batch, wanted in zip(batches, expected, strict=True):
            for name, tensor, other in zip(batch._fields, batch, wanted, strict=True):
                for key in tensor if isinstance(tensor, dict) else [...]:
                    assert tensor[key].dtype == other[key].dtype and tensor[key].device.type == device, name
                    np.testing.assert_allclose(tensor[key].cpu(), other[key].cpu(), atol=1e-6, err_msg=name)
    assert explained_variance_of(ours) == pytest.approx(explained_variance_of(host), abs=1e-5)
    ours.reset()
    assert (ours.values.data_ptr(), ours.actions.data_ptr()) == addresses


def test_a_rollout_must_be_complete_and_no_longer() -> None:
    buffer = filled(DeviceRolloutBuffer, VECTOR)
    with pytest.raises(ValueError, match=r"The rollout buffer is full \(5 steps\)"):
        buffer.begin_step(np.zeros((3, 3)))
    buffer.reset()
    with pytest.raises(ValueError, match="The rollout is incomplete"):
        next(buffer.get(2))
    assert needs_complete_rollout(buffer)


def test_permutations_may_come_from_torchs_generator() -> None:
    buffer = filled(DeviceRolloutBuffer, VECTOR, draws_on_device=True)
    state = np.random.get_state()[1].tolist()
    th.manual_seed(4)
    rows = buffer.draw_rows()
    assert sorted(rows.tolist()) == list(range(15)) and np.random.get_state()[1].tolist() == state
    th.manual_seed(4)
    returns = th.cat([batch.returns for batch in buffer.get(4)])
    assert th.equal(returns, buffer.returns.flatten()[rows])


class Walk(gym.Env[Any, Any]):
    """Ends after three steps; truncated, unless the action was positive."""

    observation_space = VECTOR
    action_space = BOX

    def __init__(self, spoilt_at: int = -1) -> None:
        self.n, self.spoilt_at = 0, spoilt_at

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.x = 0, 0.5
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps, self.n = self.steps + 1, self.n + 1
        self.x += 0.1 * float(np.mean(action))
        ends, terminates = self.steps == 3, bool(action[0] > 0)
        return self._observe(), -abs(self.x), ends and terminates, ends and not terminates, {}

    def _observe(self) -> np.ndarray:
        return np.array([np.nan if self.n == self.spoilt_at else self.x, self.steps, 0.0], np.float32)


class Stop(BaseCallback):
    """Keeps the types of the local variables, and stops at a step."""

    def _on_step(self) -> bool:
        self.types = {name: type(self.locals[name]) for name in ("actions", "clipped_actions", "rewards", "values")}
        return self.n_calls < 12


@pytest.mark.parametrize("vec_env", [DummyVecEnv, FastDummyVecEnv])
def test_training_from_environments_on_the_host_is_the_same(vec_env: Any) -> None:
    models = []
    for kind in (None, DeviceRolloutBuffer):
        env = vec_env([Walk] * 4)
        model = ClipPPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=2, seed=3, device="cpu",
                        engine="autograd", rollout_buffer_class=kind, kl_coef=0.1, clip_range_vf=0.5)  # fmt: skip
        models.append(model.learn(96))
    host, device = (model.rollout_buffer for model in models)
    for name in ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "dist_params"):
        np.testing.assert_allclose(getattr(host, name), getattr(device, name), atol=2e-6, err_msg=name)
    weights = [th.nn.utils.parameters_to_vector(model.policy.parameters()).detach() for model in models]
    np.testing.assert_allclose(*weights, atol=2e-6)
    for name in ("_last_obs", "_last_episode_starts"):
        np.testing.assert_allclose(*(getattr(model, name) for model in models), atol=2e-6)


def test_callbacks_see_what_sb3_shows_and_may_stop() -> None:
    callback = Stop()
    model = ClipPPO("MlpPolicy", DummyVecEnv([Walk] * 2), n_steps=8, batch_size=16, device="cpu",
                    engine="autograd", rollout_buffer_class=DeviceRolloutBuffer)  # fmt: skip
    model.learn(1000, callback)
    assert model.num_timesteps == 24
    array = np.ndarray
    assert callback.types == {"actions": array, "clipped_actions": array, "rewards": array, "values": th.Tensor}


def test_numbers_that_are_not_finite_are_reported_at_their_step() -> None:
    model = ClipPPO("MlpPolicy", DummyVecEnv([Walk, lambda: Walk(spoilt_at=5)]), n_steps=8, batch_size=16,
                    device="cpu", engine="autograd", rollout_buffer_class=DeviceRolloutBuffer)  # fmt: skip
    with pytest.raises(NonFiniteError, match="`observation` of environment 1") as caught:
        model.learn(16)
    assert (caught.value.step, caught.value.env_index) == (5, 1)


class OnGpu(ClipPPO):
    """Believes that it is on a GPU when it builds its buffer."""

    def _make_rollout_buffer(self, *args: Any, **kwargs: Any) -> Any:
        own, self.device = self.device, th.device("cuda")
        try:
            return super()._make_rollout_buffer(*args, **kwargs)
        finally:
            self.device = own


@pytest.mark.parametrize(("free", "kind"), [(2**31, DeviceRolloutBuffer), (2**30, TensorRolloutBuffer)])
def test_the_rollout_is_on_the_gpu_if_it_fits(
    free: int, kind: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sb3_clipvf.tensor_collection.free_device_memory", lambda device: free)
    monkeypatch.setattr(device_buffer, "free_device_memory", lambda device: free)
    caplog.set_level(logging.INFO, "sb3_clipvf")
    model = OnGpu("MlpPolicy", DummyVecEnv([Walk]), n_steps=8, batch_size=8, device="cpu")
    assert type(model.rollout_buffer) is kind
    where = "is kept on the device" if kind is DeviceRolloutBuffer else "stays on the host"
    assert f"The rollout {where}: it takes 0.00 MiB, and cuda has {free / 2**20:.2f} MiB free" in caplog.text
    if kind is DeviceRolloutBuffer:
        assert model.rollout_buffer.draws_on_device is False
        monkeypatch.setattr(device_buffer, "free_device_memory", lambda device: 5)
        model.rollout_buffer.device = th.device("cuda")
        with pytest.raises(ValueError, match="fit into the memory of cuda, got n_steps=8 with n_envs=1"):
            model.rollout_buffer.check_memory()


def test_the_memory_of_the_host_counts_only_for_a_rollout_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.rollout.free_memory", lambda: 0)
    for free, fits in ((2**31, True), (2**20, False)):
        monkeypatch.setattr("sb3_clipvf.tensor_collection.free_device_memory", lambda device, free=free: free)
        make = partial(OnGpu, "MlpPolicy", DummyVecEnv([Walk]), n_steps=8, batch_size=8, device="cpu")
        if fits:
            assert type(make().rollout_buffer) is DeviceRolloutBuffer
        else:
            with pytest.raises(ValueError, match="`n_steps` must be small enough for the rollout to fit into memory"):
                make()


class Poison(BaseCallback):
    """Makes a weight NaN after three steps, and keeps what the environments received."""

    def _on_step(self) -> bool:
        if self.n_calls == 3:
            with th.no_grad():
                self.model.policy.action_net.bias[0] = np.nan
        return True


def test_nan_actions_do_not_reach_environments_on_the_host(tmp_path: Path) -> None:
    env = DummyVecEnv([Walk] * 2)
    model = ClipPPO("MlpPolicy", env, n_steps=8, batch_size=16, device="cpu", engine="autograd",
                    rollout_buffer_class=DeviceRolloutBuffer)  # fmt: skip
    model.set_logger(configure(str(tmp_path), []))
    with pytest.raises(NonFiniteError, match="`parameter` 'action_net.bias'") as caught:
        model.learn(64, Poison())
    assert caught.value.step == 3 and all(inner.unwrapped.n == 3 for inner in env.envs)
    assert caught.value.path is not None
    with np.load(caught.value.path) as arrays:  # the step before
        assert np.isfinite(arrays["actions"]).all() and (arrays["rewards"] < 0).all() and arrays["dones"].all()
        np.testing.assert_array_equal(arrays["new_observations"], model._last_obs)
        np.testing.assert_allclose(arrays["observations"][:, 1], 2.0)


def test_an_infinite_reward_on_the_host_is_reported_with_its_step(tmp_path: Path) -> None:
    class Rich(Walk):
        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            obs, reward, *rest = super().step(action)
            return obs, np.inf if self.n == 5 else reward, *rest

    model = ClipPPO("MlpPolicy", DummyVecEnv([Walk, Rich]), n_steps=8, batch_size=16, device="cpu", engine="autograd",
                    rollout_buffer_class=DeviceRolloutBuffer)  # fmt: skip
    model.set_logger(configure(str(tmp_path), []))
    with pytest.raises(NonFiniteError) as caught:
        model.learn(64)
    assert (caught.value.what, caught.value.step, caught.value.env_index) == ("reward", 4, 1)
    assert caught.value.path is not None
    with np.load(caught.value.path) as arrays:
        assert arrays["rewards"][1] == np.inf and np.isfinite(arrays["rewards"][0])
        np.testing.assert_array_equal(arrays["new_observations"], model._last_obs)
        np.testing.assert_allclose(arrays["observations"][:, 1], 1.0)
        assert arrays["actions"].shape == (2, 2)


class Stopped(BaseCallback):
    def _on_step(self) -> bool:
        if self.n_calls == 5:
            raise KeyboardInterrupt
        return True


def test_ctrl_c_leaves_the_collector_where_the_environments_are() -> None:
    env = DummyVecEnv([Walk] * 2)
    model = ClipPPO("MlpPolicy", env, n_steps=8, batch_size=16, device="cpu", engine="autograd",
                    rollout_buffer_class=DeviceRolloutBuffer)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, Stopped())
    np.testing.assert_array_equal(model._last_obs, [inner.unwrapped._observe() for inner in env.envs])
    assert model._last_episode_starts.tolist() == [False, False]


SETTINGS: dict[str, Any] = {"n_steps": 8, "batch_size": 16, "n_epochs": 2, "seed": 3}
on_gpu = pytest.mark.filterwarnings("ignore:You are trying to run ClipPPO on the GPU")


class Watch(BaseCallback):
    """Keeps the tensors of each step."""

    def _on_training_start(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        names = ("obs_tensor", "actions", "rewards", "dones", "log_probs")
        self.steps.append({name: self.locals[name].clone() for name in names} | {"infos": self.locals["infos"]})
        return True


@pytest.mark.cuda
@needs_gpu
@on_gpu
@pytest.mark.parametrize(
    "action_space", [BOX, spaces.Discrete(3), spaces.MultiBinary(2)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("engine", ["autograd", "auto"])
def test_a_tensor_environment_trains_on_a_gpu(engine: str, action_space: Any) -> None:
    env = TensorWalk(device="cuda", action_space=action_space)
    model = ClipPPO("MlpPolicy", env, engine=engine, **SETTINGS)
    assert model.device.type == "cuda" and type(model.rollout_buffer) is DeviceRolloutBuffer
    assert model.rollout_buffer.draws_on_device
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
    model.learn(48 * 3)
    after = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    assert after.isfinite().all() and not th.equal(before, after)
    assert {episode["l"] for episode in model.ep_info_buffer} == {2, 3, 4}
    assert all(tensor.is_cuda for tensor in env.received)


@pytest.mark.cuda
@needs_gpu
@on_gpu
@pytest.mark.parametrize("engine", ["autograd", "auto"])
def test_a_rollout_on_a_gpu_holds_what_was_seen(engine: str) -> None:
    watch = Watch()
    model = ClipPPO("MlpPolicy", TensorWalk(device="cuda"), engine=engine, learning_rate=0.0, gamma=0.9, **SETTINGS)
    model.learn(48 * 2, watch)
    buffer, steps = model.rollout_buffer, watch.steps[-8:]
    for name, local in (("observations", "obs_tensor"), ("actions", "actions"), ("log_probs", "log_probs")):
        assert th.equal(getattr(buffer, name), th.stack([step[local] for step in steps])), name
    with th.no_grad():
        observations = buffer.observations.flatten(0, 1)
        values, log_probs, _ = model.policy.evaluate_actions(observations, buffer.actions.flatten(0, 1))
        last = model.policy.predict_values(model.env.observations).flatten()
        th.testing.assert_close(buffer.values.flatten(), values.flatten(), atol=1e-4, rtol=1e-4)
        th.testing.assert_close(buffer.log_probs.flatten(), log_probs, atol=1e-4, rtol=1e-4)
        expected = th.stack([step["rewards"] for step in steps])
        for t, step in enumerate(steps):
            for row in step["dones"].nonzero().flatten().tolist():
                if row % 2 == 0:
                    final = th.as_tensor(step["infos"][row]["terminal_observation"], device="cuda")[None]
                    expected[t, row] += 0.9 * model.policy.predict_values(final).item()
    th.testing.assert_close(buffer.rewards, expected, atol=1e-4, rtol=1e-4)
    fields = [getattr(buffer, name).cpu().numpy() for name in ("rewards", "values", "episode_starts")]
    wanted = gae(*fields, last.cpu().numpy(), steps[-1]["dones"].cpu().numpy(), 0.9, model.gae_lambda)
    np.testing.assert_allclose(buffer.advantages.cpu(), wanted[0], atol=1e-4)
    np.testing.assert_allclose(buffer.returns.cpu(), wanted[1], atol=1e-4)


@pytest.mark.cuda
@needs_gpu
@on_gpu
@pytest.mark.parametrize("engine", ["autograd", "auto"])
def test_numbers_on_a_gpu_that_are_not_finite_are_reported(engine: str) -> None:
    model = ClipPPO("MlpPolicy", TensorWalk(device="cuda"), engine=engine, **SETTINGS)
    model.learn(48)
    model.rollout_buffer.returns[3, 1] = np.nan
    with pytest.raises(NonFiniteError, match="value_loss"):
        model.train()
    env = model.env.unwrapped.env
    env.x[2] = np.nan
    with pytest.raises(NonFiniteError, match="of environment 2 must be finite"):
        model.learn(48, reset_num_timesteps=False)


@pytest.mark.cuda
@needs_gpu
@on_gpu
def test_statistics_on_a_gpu_normalise() -> None:
    env = TensorVecNormalize(TensorWalk(device="cuda"))
    model = ClipPPO("MlpPolicy", env, **SETTINGS)
    model.learn(48 * 3)
    on_cpu = TensorVecNormalize(TensorWalk())
    on_cpu.reset_tensors(seed=3)  # that of the model
    for actions in env.venv.env.received:
        on_cpu.step_tensors(actions.cpu())
    np.testing.assert_allclose(env.obs_rms.mean, on_cpu.obs_rms.mean, atol=1e-5)
    np.testing.assert_allclose(env.ret_rms.var, on_cpu.ret_rms.var, rtol=1e-4)


@pytest.mark.cuda
@needs_gpu
@on_gpu
@pytest.mark.parametrize("engine", ["autograd", "auto"])
def test_environments_on_the_host_train_on_a_gpu(engine: str) -> None:
    env = DummyVecEnv([Walk] * 4)
    model = ClipPPO("MlpPolicy", env, device="cuda", engine=engine, **SETTINGS)
    buffer = model.rollout_buffer
    assert type(buffer) is DeviceRolloutBuffer and not buffer.draws_on_device
    model.learn(96)
    assert buffer.rewards.isfinite().all() and model.num_timesteps == 96
    positions, steps = buffer.observations[..., 0].cpu().numpy(), buffer.observations[..., 1].cpu().numpy()
    moved = positions + 0.1 * np.clip(buffer.actions.cpu().numpy(), -1, 1).mean(-1)
    goes_on = steps[:-1] < 2
    np.testing.assert_allclose(positions[1:][goes_on], moved[:-1][goes_on], atol=1e-5)
    np.testing.assert_array_equal(buffer.episode_starts.cpu().numpy()[1:], steps[1:] == 0)


@pytest.mark.cuda
@needs_gpu
@on_gpu
def test_a_captured_environment_steps_as_its_operations_do() -> None:
    module = tensor_pendulum()
    env, captured = (module.TensorPendulum(64, "cuda", time_limit=5) for _ in range(2))
    graphed = GraphedTensorEnv(captured)
    first = [each.reset_tensors(seed=5).clone() for each in (env, graphed)]
    assert th.equal(*first)
    actions = th.linspace(-3, 3, 64, device="cuda")[:, None]
    for number in range(12):
        step, again = (each.step_tensors(actions * number / 10) for each in (env, graphed))
        for name in ("observations", "rewards", "terminated", "truncated", "final_observations"):
            th.testing.assert_close(getattr(step, name), getattr(again, name), msg=name)
        assert bool(again.truncated.all()) == (number % 5 == 4)
    model = ClipPPO("MlpPolicy", graphed, **SETTINGS)
    model.learn(64 * 8 * 2)
    assert {episode["l"] for episode in model.ep_info_buffer} == {5}
    assert graphed._captures and graphed._graph is not None


DETERMINISTIC = """
import torch as th
from tensor_cases import InPlaceWalk
from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import GraphedTensorEnv, TensorVecNormalize

th.use_deterministic_algorithms(True)
for engine in ("autograd", "cuda_graph"):
    weights = []
    for _ in range(2):
        env = TensorVecNormalize(GraphedTensorEnv(InPlaceWalk(device="cuda")))
        model = ClipPPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=2, seed=3, engine=engine).learn(48 * 3)
        assert {episode["l"] for episode in model.ep_info_buffer} == {2, 3, 4}
        weights.append([parameter.detach() for parameter in model.policy.parameters()])
    assert all(map(th.equal, *weights)), engine
"""


@pytest.mark.cuda
@needs_gpu
def test_deterministic_algorithms_train_on_tensor_environments() -> None:
    """cuBLAS reads its setting when a process first uses it."""
    variables = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", DETERMINISTIC], env=variables, check=True, timeout=300)
