"""Statistics of tensor environments: those of SB3's VecNormalize, on the device, in files and in checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization
from tensor_cases import DICT, VECTOR, Plain, TensorWalk

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint.model_statistics import has_statistics, load_statistics
from sb3_clipvf.checkpoint.training_checkpoint import TrainingCheckpoint
from sb3_clipvf.envs import FastVecNormalize, TensorVecNormalize, as_vec_env
from sb3_clipvf.tensor_collection import trains_on_tensors

# SB3 computes the moments of a step in float32, ours are in float64.
CLOSE = 1e-5


def moments(env: Any) -> list[Any]:
    rms = env.obs_rms
    parts = list(rms.values()) if isinstance(rms, dict) else [rms]
    return [number for part in [*parts, env.ret_rms] for number in (part.mean, part.var, part.count)]


@pytest.mark.parametrize(
    "arguments", [{}, {"norm_reward": False}, {"clip_obs": 0.5, "gamma": 0.5}, {"training": False}]
)
@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
def test_steps_are_those_of_vec_normalize(space: Any, arguments: dict[str, Any]) -> None:
    if space is DICT:
        arguments = {**arguments, "norm_obs_keys": ["vector"]}
    ours = TensorVecNormalize(TensorWalk(observation_space=space), **arguments)
    sb3s = VecNormalize(as_vec_env(TensorWalk(observation_space=space)), **arguments)
    expected = sb3s.reset()
    obs: Any = ours.reset_tensors()
    for number in range(9):
        for key in obs if isinstance(obs, dict) else [...]:
            np.testing.assert_allclose(obs[key], expected[key], atol=CLOSE)
        actions = np.full((6, 2), 0.05 * number, np.float32)
        step = ours.step_tensors(th.from_numpy(actions))
        expected, rewards, dones, infos = sb3s.step(actions)
        obs = step.observations
        np.testing.assert_allclose(step.rewards, rewards, atol=CLOSE)
        for row in np.flatnonzero(dones):
            final: Any = step.final_observations
            wanted = infos[row]["terminal_observation"]
            for key in wanted if isinstance(wanted, dict) else [...]:
                np.testing.assert_allclose(final[key][row], wanted[key], atol=CLOSE)
    for ours_number, sb3s_number in zip(moments(ours), moments(sb3s), strict=True):
        np.testing.assert_allclose(ours_number, sb3s_number, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours.returns, sb3s.returns, atol=1e-6)
    original, wanted = ours.get_original_obs(), sb3s.get_original_obs()
    np.testing.assert_array_equal(*((part["vector"] if space is DICT else part) for part in (original, wanted)))
    np.testing.assert_allclose(ours.get_original_reward(), sb3s.get_original_reward())


def test_steps_on_the_host_and_on_the_device_share_their_statistics() -> None:
    mixed, plain = TensorVecNormalize(TensorWalk()), FastVecNormalize(as_vec_env(TensorWalk()))
    np.testing.assert_array_equal(mixed.reset(), plain.reset())
    actions = np.full((6, 2), 0.1, np.float32)
    for number in range(8):
        if number % 3:
            obs = mixed.step_tensors(th.from_numpy(actions)).observations
            assert mixed.observations is obs
        else:
            obs = mixed.step(actions)[0]
            assert mixed.observations is None
        np.testing.assert_allclose(obs, plain.step(actions)[0], atol=CLOSE)
    mixed.obs_rms.mean[:] = 0.0  # takes effect at the next step
    mixed.training = False
    before = mixed.venv.env.x.clone()
    step = mixed.step_tensors(th.zeros(6, 2))
    assert float(step.final_observations[0, 0]) == pytest.approx(
        float(before[0]) / np.sqrt(mixed.obs_rms.var[0] + 1e-8)
    )


def test_training_through_tensors_is_that_through_arrays() -> None:
    models = []
    for env in (FastVecNormalize(Plain(as_vec_env(TensorWalk()))), TensorVecNormalize(TensorWalk())):
        model = ClipPPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=2, seed=3, device="cpu")
        assert trains_on_tensors(env, model.rollout_buffer) == (type(env) is TensorVecNormalize)
        models.append(model.learn(48 * 3))
    vectors = [th.nn.utils.parameters_to_vector(model.policy.parameters()).detach() for model in models]
    np.testing.assert_allclose(*vectors, atol=1e-4)
    assert [episode["r"] for episode in models[0].ep_info_buffer] == pytest.approx(
        [episode["r"] for episode in models[1].ep_info_buffer], abs=1e-3
    )
    assert models[1].get_vec_normalize_env() is models[1].env


@pytest.mark.parametrize("reader", [TensorVecNormalize, FastVecNormalize, VecNormalize])
def test_files_are_those_of_vec_normalize(reader: Any, tmp_path: Path) -> None:
    env = TensorVecNormalize(TensorWalk(), gamma=0.7)
    env.reset_tensors()
    env.step_tensors(th.ones(6, 2))
    env.save(str(tmp_path / "statistics.pkl"))
    assert env.observations is not None
    loaded = reader.load(str(tmp_path / "statistics.pkl"), as_vec_env(TensorWalk()))
    assert type(loaded) is reader and loaded.gamma == 0.7
    for number, again in zip(moments(env), moments(loaded), strict=True):
        np.testing.assert_array_equal(number, again)
    assert not {"observations", "_on_device"} & vars(loaded).keys()
    if reader is TensorVecNormalize:
        obs = loaded.reset_tensors()
        np.testing.assert_allclose(obs, env.reset_tensors(), atol=1e-6)


def test_attributes_that_vec_normalize_lacks_are_missing() -> None:
    env, other = (TensorVecNormalize(TensorWalk(), norm_obs=False) for _ in range(2))
    assert not hasattr(env, "obs_rms") and env.ret_rms.count == pytest.approx(1e-4)
    with pytest.raises(AttributeError, match="'TensorVecNormalize' object has no attribute 'old_obs'"):
        env.get_original_obs()
    assert env.statistics is env.venv.statistics  # attributes of the environments are still found
    env.ret_rms.mean = 2.0
    sync_envs_normalization(env, other)
    assert other.ret_rms.mean == 2.0


def test_statistics_are_synchronised() -> None:
    env = TensorVecNormalize(TensorWalk())
    env.reset_tensors()
    for other in (TensorVecNormalize(TensorWalk()), FastVecNormalize(as_vec_env(TensorWalk()))):
        sync_envs_normalization(env, other)
        np.testing.assert_array_equal(other.obs_rms.mean, env.obs_rms.mean)
        assert other.obs_rms is not env.obs_rms


@pytest.mark.parametrize("wrap", [TensorVecNormalize, lambda env: env], ids=["normalised", "plain"])
def test_a_checkpoint_holds_the_statistics(wrap: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n_steps": 8, "batch_size": 16, "n_epochs": 2, "seed": 3, "device": "cpu"}

    def checkpoint(folder: str) -> TrainingCheckpoint:
        return TrainingCheckpoint(48, tmp_path / folder, reset_envs=True)

    whole = ClipPPO("MlpPolicy", wrap(TensorWalk()), **settings)
    whole.learn(48 * 4, checkpoint("whole"))
    part = ClipPPO("MlpPolicy", wrap(TensorWalk()), **settings)
    part.learn(48 * 2, checkpoint("part"))
    with pytest.raises(ValueError, match="number of environments of the checkpoint, 6, got 5"):
        ClipPPO.resume(tmp_path / "part", wrap(TensorWalk(5)))
    model = ClipPPO.resume(tmp_path / "part", wrap(TensorWalk()))
    model.learn(48 * 2, checkpoint("part"), reset_num_timesteps=False)
    assert model.num_timesteps == whole.num_timesteps == 192
    np.testing.assert_array_equal(
        *(th.nn.utils.parameters_to_vector(each.policy.parameters()).detach() for each in (whole, model))
    )
    if wrap is TensorVecNormalize:
        for number, again in zip(moments(whole.env), moments(model.env), strict=True):
            np.testing.assert_array_equal(number, again)


@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
def test_observations_are_normalised_again_after_a_pause(space: Any) -> None:
    arguments = {} if space is VECTOR else {"norm_obs_keys": ["vector"]}
    ours = TensorVecNormalize(TensorWalk(observation_space=space), **arguments)
    sb3s = VecNormalize(as_vec_env(TensorWalk(observation_space=space)), **arguments)
    ours.reset_tensors(), sb3s.reset()
    actions = np.full((6, 2), 0.1, np.float32)
    for norm_obs in (False, True, False, True):
        assert norm_obs or ours.obs_rms is not None  # moves the statistics to the host
        ours.norm_obs = sb3s.norm_obs = norm_obs
        for _ in range(2):
            obs, expected = ours.step_tensors(th.from_numpy(actions)).observations, sb3s.step(actions)[0]
            for key in obs if isinstance(obs, dict) else [...]:
                np.testing.assert_allclose(obs[key], expected[key], atol=CLOSE)
    for number, wanted in zip(moments(ours), moments(sb3s), strict=True):
        np.testing.assert_allclose(number, wanted, rtol=1e-6, atol=1e-6)


def test_statistics_are_built_even_if_observations_are_not_normalised_at_the_reset() -> None:
    ours, sb3s = TensorVecNormalize(TensorWalk()), VecNormalize(as_vec_env(TensorWalk()))
    ours.norm_obs = sb3s.norm_obs = False
    np.testing.assert_allclose(ours.reset_tensors(), sb3s.reset())
    ours.norm_obs = sb3s.norm_obs = True
    actions = np.full((6, 2), 0.1, np.float32)
    observations = ours.step_tensors(th.from_numpy(actions)).observations
    # A column of equal values has almost no variance, by which the rounding of its mean is divided.
    np.testing.assert_allclose(observations, sb3s.step(actions)[0], atol=1e-4)


@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
def test_observations_without_statistics_are_refused(space: Any) -> None:
    arguments: dict[str, Any] = {"norm_obs": False} if space is VECTOR else {"norm_obs_keys": ["vector"]}
    env = TensorVecNormalize(TensorWalk(observation_space=space), **arguments)
    env.reset_tensors()
    env.norm_obs, env.norm_obs_keys = True, None if space is VECTOR else ["vector", "image"]
    with pytest.raises(ValueError, match="`obs_rms` must have statistics of all observations to normalise, got"):
        env.step_tensors(th.zeros(6, 2))


@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
def test_the_command_line_takes_the_statistics_of_a_checkpoint(space: Any, tmp_path: Path) -> None:
    env = TensorVecNormalize(TensorWalk(observation_space=space), norm_obs_keys=None if space is VECTOR else ["vector"])
    model = ClipPPO(
        "MlpPolicy" if space is VECTOR else "MultiInputPolicy",
        env,
        n_steps=8,
        batch_size=16,
        n_epochs=1,
        device="cpu",
    )
    model.learn(48, TrainingCheckpoint(48, tmp_path))
    path = tmp_path / "checkpoint_48.zip"
    assert has_statistics(path)
    loaded = load_statistics(path, as_vec_env(TensorWalk(2, observation_space=space)))
    assert type(loaded) is VecNormalize and loaded.norm_obs_keys == env.norm_obs_keys
    for number, again in zip(moments(env), moments(loaded), strict=True):
        np.testing.assert_array_equal(number, again)


def test_other_environments_are_refused() -> None:
    with pytest.raises(TypeError, match="`venv` must be a tensor environment.*got Plain"):
        TensorVecNormalize(Plain(as_vec_env(TensorWalk())))
