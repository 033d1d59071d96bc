"""
Determinism: the same seed gives the same weights, to the last bit, in any process and any kind of environments.

Run as a program it prints a digest of the weights after each training: ``python test_determinism.py``.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from kernel_cases import Doubling
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import FastDummyVecEnv, FastSubprocVecEnv, FastVecNormalize, as_vec_env

HAS_ENVPOOL = importlib.util.find_spec("envpool") is not None
STEPS = 384
"""Three updates of two environments; where there may be two threads, the native engine tries both in turn."""


def train(env: VecEnv, seed: int = 4, n_threads: int = 1, **kwargs: Any) -> ClipPPO:
    common: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "device": "cpu", "seed": seed}
    common |= {"clip_range": "lin_0.2", "clip_range_vf": 1.0}
    model = ClipPPO("MlpPolicy", env, **{**common, **kwargs})
    # Not before: torch's orthogonal initialisation depends on the number of threads.
    th.set_num_threads(n_threads)
    model.learn(STEPS)
    th.set_num_threads(1)
    env.close()
    return model


def weights_of(model: ClipPPO) -> str:
    optimizer = model.policy.optimizer.state_dict()["state"]
    tensors = [
        *model.policy.state_dict().values(),
        *(value for state in optimizer.values() for value in state.values()),
    ]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def pendulums(**kwargs: Any) -> VecEnv:
    return make_vec_env("Pendulum-v1", 2, env_kwargs={"max_episode_steps": 40}, **kwargs)


ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("NativeEngine", {"engine": "native"}),
    "fused": ("FusedEngine", {"policy_kwargs": {"features_extractor_class": Doubling}}),
    "autograd": ("AutogradEngine", {"engine": "autograd"}),
}
"""Class of each engine, and the arguments that select it."""


def all_weights(n_native_threads: int) -> dict[str, str]:
    """Of one training for each engine."""
    found = {}
    for name, (engine, kwargs) in ENGINES.items():
        # Sums of torch may depend on the number of threads; those of the native engine do not.
        n_threads = n_native_threads if name == "native" else 1
        model = train(FastVecNormalize(pendulums()), n_threads=n_threads, **kwargs)
        if type(model._engine).__name__ != engine:
            raise RuntimeError(f"{name} ran on {model._engine}")
        found[name] = weights_of(model)
    return found


@pytest.fixture(scope="module")
def of_two_processes() -> list[dict[str, str]]:
    """Return the digests of two processes with different hash seeds and numbers of threads."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, n_threads],
            env={**os.environ, "PYTHONHASHSEED": n_threads, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
        )
        for n_threads in ("1", "2")
    ]
    found = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in found]


@pytest.mark.parametrize("engine", ENGINES)
def test_fresh_processes_train_the_same_weights(engine: str, of_two_processes: list[dict[str, str]]) -> None:
    first, second = of_two_processes
    assert first[engine] == second[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_has_trained_before_trains_the_same_weights(engine: str) -> None:
    kwargs = ENGINES[engine][1]
    first, other, again = (weights_of(train(pendulums(), seed, **kwargs)) for seed in (4, 5, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_environments_in_other_processes_give_the_same_weights(env_id: str, engine: str) -> None:
    found = set()
    for vec_env_cls in (DummyVecEnv, FastDummyVecEnv, SubprocVecEnv, FastSubprocVecEnv):
        kwargs = {"start_method": "fork"} if issubclass(vec_env_cls, SubprocVecEnv) else None
        env = make_vec_env(env_id, 2, vec_env_cls=vec_env_cls, vec_env_kwargs=kwargs)
        assert type(env) is vec_env_cls
        found.add(weights_of(train(env, **ENGINES[engine][1])))
    assert len(found) == 1


def test_truncated_and_normalised_episodes_do_not_depend_on_processes() -> None:
    found = set()
    for vec_env_cls in (DummyVecEnv, FastDummyVecEnv, FastSubprocVecEnv):
        processes = {"n_workers": 2, "start_method": "fork"} if vec_env_cls is FastSubprocVecEnv else None
        limit = {"max_episode_steps": 50}
        env = make_vec_env("Pendulum-v1", 2, env_kwargs=limit, vec_env_cls=vec_env_cls, vec_env_kwargs=processes)
        found.add(weights_of(train(FastVecNormalize(env))))
    assert len(found) == 1


def envpool_of_one_thread() -> Any:
    import envpool

    return envpool.make_gymnasium("CartPole-v1", num_envs=2, num_threads=1, seed=0)


def envpool_of_two_threads() -> Any:
    import envpool

    return envpool.make_gymnasium("CartPole-v1", num_envs=2, num_threads=2, seed=0)


def acrobots(mode: str) -> Callable[[], Any]:
    return lambda: gym.make_vec("Acrobot-v1", 2, vectorization_mode=mode, max_episode_steps=30)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: gym.make_vec("CartPole-v1", 2), lambda: gym.make_vec("CartPole-v1", 2)),
        (acrobots("sync"), acrobots("async")),
        pytest.param(
            envpool_of_one_thread,
            envpool_of_two_threads,
            marks=pytest.mark.skipif(not HAS_ENVPOOL, reason="needs envpool"),
        ),
    ],
    ids=["CartPoleVectorEnv", "SyncVectorEnv and AsyncVectorEnv", "EnvPool"],
)
def test_vectorised_environments_give_the_same_weights(first: Callable[[], Any], second: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EnvPool's spaces and about forks
        models = [train(as_vec_env(make())) for make in (first, second)]
    assert weights_of(models[0]) == weights_of(models[1])


if __name__ == "__main__":
    th.set_num_threads(1)
    sys.stdout.write(json.dumps(all_weights(int(sys.argv[1]))))
