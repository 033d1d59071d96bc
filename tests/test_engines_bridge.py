"""Conversions between PPO and kernels: arrays of every type that an environment, a callback or a network may supply."""

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from test_engines import BOX, COEFFICIENTS, SETTINGS, collect

from sb3_clipvf.distributions import dist_param_dim
from sb3_clipvf.engines.bridge import KINDS, as_floats
from sb3_clipvf.engines.fused import FusedEngine
from sb3_clipvf.engines.kernels import entry, warmup
from sb3_clipvf.engines.native import _ACTIVATIONS, NativeEngine
from sb3_clipvf.engines.recognition import ACTIVATIONS, DISTRIBUTIONS
from sb3_clipvf.rollout import TensorRolloutBuffer

N_STEPS, N_ENVS, WIDTH = 6, 5, 3
KERNELS = (*entry.NATIVE, entry.kl_of_rollout, *entry.FUSED)


class Subclass(np.ndarray):
    pass


def misaligned(array: np.ndarray) -> np.ndarray:
    memory = np.empty(array.nbytes + 1, np.uint8)
    copied = memory[1:].view(array.dtype).reshape(array.shape)
    copied[:] = array
    return copied


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


VARIANTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{
        np.dtype(dtype).name: operator.methodcaller("astype", dtype)
        for dtype in (np.float64, np.float16, np.int64, np.int32, np.int16, np.int8)
    },
    "uint8": lambda array: np.abs(array).astype(np.uint8),
    "bool": lambda array: array > 0,
    "other byte order": lambda array: array.astype(array.dtype.newbyteorder()),
    "strided": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "reversed": lambda array: array[::-1],
    "transposed": np.asfortranarray,
    "misaligned": misaligned,
    "read-only": read_only,
    "subclass": lambda array: array.view(Subclass),
}
# Numbers of several digits and both signs, of which integers keep something, within int8.
NUMBERS = np.random.default_rng(0).uniform(-9, 9, (N_STEPS, N_ENVS)).astype(np.float32)


@pytest.fixture(autouse=True)
def compiles_nothing() -> Iterator[None]:
    """Check that kernels which are called in a test are not compiled again."""
    for group in warmup.GROUPS:
        warmup.warm_up(group)
    before = [list(kernel.signatures) for kernel in KERNELS]
    yield
    assert [list(kernel.signatures) for kernel in KERNELS] == before


def make_policy(obs_dtype: Any = np.float32, **kwargs: Any) -> ActorCriticPolicy:
    th.manual_seed(1)
    space = spaces.Box(0, 100, (WIDTH,), obs_dtype)
    return ActorCriticPolicy(space, BOX, lambda _: 3e-3, **{"net_arch": [8], **kwargs})


def filled(policy: ActorCriticPolicy) -> TensorRolloutBuffer:
    buffer = TensorRolloutBuffer(
        N_STEPS,
        policy.observation_space,
        BOX,
        "cpu",
        n_envs=N_ENVS,
        dist_param_dim=dist_param_dim(policy.action_dist) or 0,
    )
    return collect(policy, buffer, moved=0.01)


def updated(engine_class: type[Any], change: Callable[[TensorRolloutBuffer], object]) -> list[th.Tensor]:
    """Return the parameters after an update on a rollout that a callback has changed."""
    policy = make_policy()
    buffer = filled(policy)
    change(buffer)
    np.random.seed(0)
    engine_class(policy, SETTINGS).update(buffer, COEFFICIENTS)
    return list(policy.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_floats(variant: str) -> None:
    array = VARIANTS[variant](NUMBERS)
    floats = as_floats(array)
    assert (type(floats), floats.dtype, floats.flags.carray) == (np.ndarray, np.float32, True)
    np.testing.assert_array_equal(floats, array.astype(np.float32))
    assert as_floats(floats) is floats


def test_kernels_have_a_constant_for_each_class_that_is_recognised() -> None:
    assert set(KINDS) == set(DISTRIBUTIONS)
    assert set(_ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_float32_become_infinite() -> None:
    assert as_floats(np.array([1e300, -1e300, np.nan])).tolist() == pytest.approx(
        [np.inf, -np.inf, np.nan], nan_ok=True
    )


# Observations may stay as they are. `as_floats` casts the others. NumPy's own functions would leave a type, strides or
# an alignment as it is.
ROLLOUTS = [("observations", variant) for variant in VARIANTS] + [
    (name, variant)
    for name in ("actions", "values", "log_probs", "advantages", "returns", "dist_params")
    for variant in ("float64", "strided", "misaligned")
]


@pytest.mark.parametrize(("name", "variant"), ROLLOUTS)
@pytest.mark.parametrize("engine_class", [NativeEngine, FusedEngine])
def test_an_update_casts_the_arrays_of_a_rollout(engine_class: type[Any], name: str, variant: str) -> None:
    def replace(buffer: TensorRolloutBuffer) -> None:
        setattr(buffer, name, VARIANTS[variant](getattr(buffer, name)))

    def cast(buffer: TensorRolloutBuffer) -> None:
        replace(buffer)
        setattr(buffer, name, np.array(getattr(buffer, name), np.float32, order="C"))

    for ours, expected in zip(updated(engine_class, replace), updated(engine_class, cast), strict=True):
        assert th.equal(ours, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["rewards", "values", "episode_starts", "last_values", "dones"])
def test_advantages_cast_the_arrays_of_a_rollout(name: str, variant: str) -> None:
    buffer = filled(make_policy())
    NativeEngine(make_policy(), SETTINGS).begin_rollout(buffer)
    arrays = {name: getattr(buffer, name) for name in ("rewards", "values", "episode_starts")}
    arrays |= {"last_values": NUMBERS[0], "dones": np.array([True, False, False, True, False])}
    replaced = VARIANTS[variant](arrays[name] if name != "dones" else arrays[name].astype(np.float32))
    ours = buffer.gae_fn(**{**arrays, name: replaced}, gamma=1, gae_lambda=np.float32(0.5))
    cast = {name: np.array(array, np.float32, order="C") for name, array in {**arrays, name: replaced}.items()}
    for array, expected in zip(ours, buffer.gae_fn(**cast, gamma=1.0, gae_lambda=0.5), strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_acting_casts_observations(variant: str) -> None:
    observations = VARIANTS[variant](NUMBERS[:, :WIDTH])
    engine = NativeEngine(make_policy(), SETTINGS)
    engine.begin_rollout(filled(engine.policy))
    results = []
    for each in (observations, np.array(observations, np.float32, order="C")):
        th.manual_seed(0)
        acted = engine.act(each, with_dist_params=True)
        results.append((acted.actions, acted.values, acted.log_prob, acted.dist_params))
    th.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [th.float64, th.float16, th.int64, th.uint8, th.bool])
@pytest.mark.parametrize("engine_class", [NativeEngine, FusedEngine])
def test_acting_casts_tensors(engine_class: type[Any], dtype: th.dtype) -> None:
    engine = engine_class(make_policy(), SETTINGS)
    engine.begin_rollout(filled(engine.policy))
    observations = th.arange(2 * WIDTH).reshape(WIDTH, 2).T.to(dtype)
    results = []
    for each in (observations, observations.float().contiguous()):
        th.manual_seed(0)
        acted = engine.act(each, with_dist_params=True)
        results.append((acted.actions, acted.values, acted.log_prob, acted.dist_params, engine.predict_values(each)))
    th.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int8, np.int16, np.uint16, np.int64])
def test_stored_observations_are_converted_minibatch_by_minibatch(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of all observations as float32 would take up to four times the memory of the rollout."""
    stored: list[np.ndarray] = []
    run_update = entry.run_update

    def spy(rank: int, n_threads: int, policy: Any, rollout: Any, *others: Any) -> Any:
        stored.append(rollout.observations)
        return run_update(rank, n_threads, policy, rollout, *others)

    monkeypatch.setattr(entry, "run_update", spy)
    results = []
    for stored_dtype in (dtype, np.float32):
        policy = make_policy(stored_dtype)
        buffer = filled(policy)
        assert buffer.observations.dtype == stored_dtype
        buffer.observations[:] = (7 * np.abs(NUMBERS)[..., None] + np.arange(WIDTH)).astype(dtype)
        np.random.seed(0)
        statistics = NativeEngine(policy, SETTINGS).update(buffer, COEFFICIENTS)
        results.append([*policy.parameters(), statistics.kl_after])
        if stored_dtype == dtype:
            is_copied = not np.shares_memory(stored[-1], buffer.observations)
            assert is_copied == (np.dtype(dtype) not in (np.float32, np.float64, np.uint8, np.int8))
    th.testing.assert_close(*results, rtol=0, atol=0)


def test_sizes_of_any_integer_type() -> None:
    buffer = filled(policy := make_policy())
    buffer.buffer_size, buffer.n_envs = np.int32(N_STEPS), np.int16(N_ENVS)
    settings = dataclasses.replace(SETTINGS, batch_size=np.int32(8))
    for engine_class in (NativeEngine, FusedEngine):
        engine_class(policy, settings).update(buffer, COEFFICIENTS)


class Converted(th.nn.Linear):
    """A last layer whose outputs are neither float32 nor contiguous."""

    def forward(self, features: th.Tensor) -> th.Tensor:
        return super().forward(features).double().repeat_interleave(2, dim=1)[:, ::2]


def test_outputs_of_the_users_networks() -> None:
    results = []
    for converts in (False, True):
        policy = make_policy()
        buffer = filled(policy)
        if converts:
            for head in (policy.action_net, policy.value_net):
                head.__class__ = Converted
        engine = FusedEngine(policy, SETTINGS)
        engine.begin_rollout(buffer)
        th.manual_seed(0)
        acted = engine.act(th.ones(N_ENVS, WIDTH), with_dist_params=True)
        np.random.seed(0)
        engine.update(buffer, COEFFICIENTS)
        results.append([acted.actions, acted.log_prob, acted.dist_params, *policy.parameters()])
    th.testing.assert_close(*results, rtol=0, atol=0)
