"""Host parity: under SB3_EQUIVALENT, ClipPPO ends with the weights of SB3's PPO from the same seed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.envs import IdentityEnv, SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_clipvf import SB3_EQUIVALENT, ClipPPO


class Wander(gym.Env[np.ndarray, Any]):
    """A walk on a line with every action space, which is cut off after ``limit`` steps and rarely ends by itself."""

    def __init__(self, action_space: spaces.Space[Any], limit: int, start: float) -> None:
        self.observation_space = spaces.Box(-10.0, 10.0, (3,), np.float32)
        self.action_space = action_space
        self.limit, self.start = limit, start

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.x = 0, self.start
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.x += float(np.tanh(np.mean(action))) - 0.3
        terminated = abs(self.x) > 9
        return self._observe(), -abs(self.x), terminated, self.steps >= self.limit, {}

    def _observe(self) -> np.ndarray:
        return np.array([self.x, self.x**2 / 10, self.steps / self.limit], np.float32)


class Picture(Wander):
    """The walk seen through a camera: a bright column on a dark uint8 image, channels last."""

    def __init__(self) -> None:
        super().__init__(spaces.Discrete(3), limit=9, start=0.5)
        self.observation_space = spaces.Box(0, 255, (40, 40, 1), np.uint8)

    def _observe(self) -> np.ndarray:
        image = np.zeros((40, 40, 1), np.uint8)
        image[:, int(2 * self.x) + 20] = 200
        return image


def wander(action_space: spaces.Space[Any], n_envs: int = 3) -> DummyVecEnv:
    """Return environments that are truncated at different steps, never two at once (see the batched test below)."""
    return DummyVecEnv(
        [
            lambda i=i: gym.wrappers.TimeLimit(Wander(action_space, 10**6, 0.5 * i), max_episode_steps=7 + 4 * i)
            for i in range(n_envs)
        ]
    )


BOX = spaces.Box(-2.0, 1.0, (2,), np.float32)
SMALL: dict[str, Any] = {"n_steps": 20, "batch_size": 16, "n_epochs": 3, "seed": 3, "device": "cpu"}

CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "discrete": (lambda: wander(spaces.Discrete(3)), "MlpPolicy", {}),
    "entropy": (lambda: wander(spaces.Discrete(3)), "MlpPolicy", {"ent_coef": 0.01}),
    "box": (lambda: wander(BOX), "MlpPolicy", {}),
    "multi_discrete": (lambda: wander(spaces.MultiDiscrete([3, 4])), "MlpPolicy", {}),
    "multi_binary": (lambda: wander(spaces.MultiBinary(4)), "MlpPolicy", {}),
    "schedules": (
        lambda: wander(BOX),
        "MlpPolicy",
        {"learning_rate": lambda p: 1e-3 * p, "clip_range": lambda p: 0.05 + 0.2 * p},
    ),
    "value_clip": (lambda: wander(BOX), "MlpPolicy", {"clip_range_vf": lambda p: 0.1 * p + 0.01}),
    "target_kl": (lambda: wander(BOX), "MlpPolicy", {"target_kl": 0.002, "learning_rate": 3e-3}),
    "gsde": (lambda: wander(BOX), "MlpPolicy", {"use_sde": True, "sde_sample_freq": 4}),
    "gsde_squashed": (
        lambda: wander(BOX),
        "MlpPolicy",
        {"use_sde": True, "ent_coef": 0.01, "policy_kwargs": {"squash_output": True}},
    ),
    "separate_nets": (
        lambda: wander(BOX),
        "MlpPolicy",
        {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [16, 8]}, "activation_fn": th.nn.ReLU}},
    ),
    "not_normalised": (lambda: wander(BOX), "MlpPolicy", {"normalize_advantage": False}),
    "discrete_observations": (lambda: DummyVecEnv([lambda: IdentityEnv(4, ep_length=9)]), "MlpPolicy", {}),
    "dict": (
        lambda: seeded(lambda: DummyVecEnv([lambda: SimpleMultiObsEnv(num_row=2, num_col=2, random_start=False)])),
        "MultiInputPolicy",
        {"policy_kwargs": {"net_arch": [8]}},
    ),
    "image": (
        lambda: VecFrameStack(DummyVecEnv([Picture]), 2),
        "CnnPolicy",
        {"policy_kwargs": {"features_extractor_kwargs": {"features_dim": 8}}},
    ),
    "vec_normalize": (lambda: VecNormalize(wander(BOX), gamma=0.9), "MlpPolicy", {"gamma": 0.9}),
    "host_buffer": (lambda: wander(BOX), "MlpPolicy", {"rollout_buffer_class": RolloutBuffer}),
}


def seeded(make_env: Callable[[], Any]) -> Any:
    """An environment whose pictures are drawn from the process's random state when it is made."""
    np.random.seed(0)
    return make_env()


def weights(model: Any) -> dict[str, th.Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def assert_same(ours: dict[str, th.Tensor], theirs: dict[str, th.Tensor], *, bitwise: bool = True) -> None:
    # Bitwise: the same operations in the same order on the same numbers. Not so for convolutions, which oneDNN sums in
    # an order that depends on where the tensors lie in memory; Adam's first steps turn 1e-7 into up to 1e-5.
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if bitwise:
            assert th.equal(tensor, theirs[name]), name
        else:
            th.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def three_updates(n_envs: int) -> int:
    return 3 * SMALL["n_steps"] * n_envs


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("case", CASES)
def test_three_updates_give_the_weights_of_sb3(case: str) -> None:
    make_env, policy, kwargs = CASES[case]
    host = PPO(policy, make_env(), **{**SMALL, **kwargs})
    initial = weights(host)
    host.learn(three_updates(host.n_envs))
    ours = ClipPPO(policy, make_env(), **{**SB3_EQUIVALENT, **SMALL, **kwargs})
    assert_same(weights(ours), initial)
    ours.learn(three_updates(ours.n_envs))
    assert_same(weights(ours), weights(host), bitwise=case not in ("image", "dict"))
    assert any(not th.equal(tensor, initial[name]) for name, tensor in weights(ours).items())
    assert ours._n_updates == host._n_updates


@pytest.mark.parametrize("calls", [[36], [12, 12, 12]])
def test_defaults_learn_as_sb3s_in_one_call_or_in_many(calls: list[int]) -> None:
    """A default schedule would end with each call: a call of one rollout would update with a rate of 0."""
    arguments: dict[str, Any] = {"n_steps": 12, "batch_size": 12, "n_epochs": 2, "seed": 0, "device": "cpu"}
    models: list[Any] = []
    for algorithm, engine in ((PPO, {}), (ClipPPO, {"engine": "autograd"})):
        models.append(algorithm("MlpPolicy", DummyVecEnv([lambda: Wander(BOX, 7, 0.1)]), **arguments, **engine))
        for total_timesteps in calls:
            models[-1].learn(total_timesteps)
    assert_same(weights(models[1]), weights(models[0]))


@pytest.mark.parametrize("engine", ["autograd", "native"])
def test_functions_of_the_user_are_called_as_sb3_calls_them(engine: str, tmp_path: Path) -> None:
    """A function with a state, such as a warm-up that counts its calls, would notice an extra call."""
    at_updates = ("ent_coef", "vf_coef", "kl_coef")
    calls: list[dict[str, list[float]]] = []
    for algorithm in (PPO, ClipPPO):
        names = ("learning_rate", "clip_range", "clip_range_vf", *(at_updates if algorithm is ClipPPO else ()))
        seen: dict[str, list[float]] = {name: [] for name in names}
        functions = {name: lambda p, own=own: own.append(p) or 0.1 for name, own in seen.items()}
        rest = {} if algorithm is PPO else {"engine": engine}
        arguments: dict[str, Any] = {"n_steps": 12, "batch_size": 12, "n_epochs": 1, "device": "cpu", **rest}
        model: Any = algorithm(
            "MlpPolicy", DummyVecEnv([lambda: Wander(spaces.Discrete(3), 7, 0.1)]), **arguments, **functions
        )
        assert not any(seen.get(name) for name in at_updates)
        model.learn(36).learn(24, reset_num_timesteps=False)
        model.save(tmp_path / algorithm.__name__)
        loaded = algorithm.load(
            tmp_path / algorithm.__name__, env=model.get_env(), custom_objects=functions, device="cpu"
        )
        loaded.learn(12)
        calls.append(seen)
    theirs, ours = calls
    assert {name: ours[name] for name in theirs} == theirs
    assert all(ours[name] == theirs["clip_range"] for name in at_updates)


def test_early_stopping_happened_in_the_target_kl_case(monkeypatch: pytest.MonkeyPatch) -> None:
    make_env, policy, kwargs = CASES["target_kl"]
    ours = ClipPPO(policy, make_env(), **{**SB3_EQUIVALENT, **SMALL, **kwargs, "batch_size": 20})
    ours.learn(three_updates(ours.n_envs))
    assert ours._n_updates < 3 * SMALL["n_epochs"]


def test_truncations_of_one_step_are_bootstrapped_together_within_rounding() -> None:
    """Several cut-off environments share one forward pass; SB3 makes one each, so matrix products round differently."""

    def make_env() -> DummyVecEnv:
        return DummyVecEnv([lambda: gym.wrappers.TimeLimit(Wander(BOX, 10**6, 0.1), 7) for _ in range(4)])

    kwargs = {**SMALL, "batch_size": 20}
    host = PPO("MlpPolicy", make_env(), **kwargs).learn(three_updates(4))
    ours = ClipPPO("MlpPolicy", make_env(), **{**SB3_EQUIVALENT, **kwargs}).learn(three_updates(4))
    for name, tensor in weights(ours).items():
        # Adam's first steps turn a rounding difference of 1e-7 in a gradient into up to lr * 1e-7 / |gradient|.
        th.testing.assert_close(tensor, host.policy.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("log_name", ["train/loss", "train/value_loss", "train/approx_kl", "train/clip_fraction"])
def test_logs_keep_sb3s_meaning(log_name: str) -> None:
    logs = []
    for algorithm, extra in ((PPO, {}), (ClipPPO, SB3_EQUIVALENT)):
        model: Any = algorithm("MlpPolicy", wander(BOX), **{**extra, **SMALL, "batch_size": 20})
        model.learn(three_updates(3), log_interval=None)
        logs.append(model.logger.name_to_value)
    assert set(logs[0]) <= set(logs[1])
    # SB3 averages the float32 numbers in double precision, as we do; its approx_kl in single precision.
    assert logs[1][log_name] == pytest.approx(logs[0][log_name], rel=1e-6)


def test_sb3s_file_continues_training_as_sb3s_ppo_would(tmp_path: Any) -> None:
    kwargs = {**SMALL, "batch_size": 20, "learning_rate": 1e-3, "clip_range": 0.1, "clip_range_vf": 0.5}
    PPO("MlpPolicy", wander(BOX), **kwargs).learn(three_updates(3)).save(tmp_path / "host")
    theirs = PPO.load(tmp_path / "host", env=wander(BOX), device="cpu")
    with pytest.warns(UserWarning, match="not saved by ClipPPO.*vf_clip='prediction'"):
        ours = ClipPPO.load(tmp_path / "host", env=wander(BOX), device="cpu")
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_array_equal(ours.predict(obs, deterministic=True)[0], theirs.predict(obs, deterministic=True)[0])
    assert type(ours.rollout_buffer).__name__ == "TensorRolloutBuffer"
    for model in (theirs, ours):
        model.set_random_seed(5)
        model.learn(three_updates(3), reset_num_timesteps=False)
    assert_same(weights(ours), weights(theirs))


def test_our_own_file_is_not_mistaken_for_sb3s(tmp_path: Any) -> None:
    model = ClipPPO("MlpPolicy", wander(BOX), **{**SMALL, "batch_size": 20}, vf_clip_units="absolute", kl_coef=0.5)
    model.save(tmp_path / "ours")
    loaded = ClipPPO.load(tmp_path / "ours", device="cpu")
    assert (loaded.kl_coef, loaded.vf_clip, loaded.vf_clip_units) == (0.5, "max", "absolute")
