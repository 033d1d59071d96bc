"""ClipPPO: schedules, controllers, logs, callbacks, buffers and files; test_parity.py compares it with SB3's PPO."""

import inspect
import io
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_clipvf import SB3_EQUIVALENT, ClipPPO, TensorRolloutBuffer
from sb3_clipvf.distributions import dist_params
from sb3_clipvf.engines.autograd import AutogradEngine
from sb3_clipvf.engines.interface import UpdateCoefficients
from sb3_clipvf.engines.kernels.warmup import warm_up
from sb3_clipvf.engines.native import NativeEngine
from sb3_clipvf.envs import FastVecNormalize
from sb3_clipvf.schedules import AdaptiveKL, KLAdaptiveLR

N_STEPS = 8
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
# Float64 arithmetic on numbers of order 1.
EXACT = 1e-12


class Walk(gym.Env[np.ndarray, Any]):
    """A walk on a line that ends after three steps: truncated, or terminated if ``terminates``."""

    def __init__(self, action_space: spaces.Space[Any] | None = None, terminates: bool = False) -> None:
        self.observation_space = spaces.Box(-10.0, 10.0, (2,), np.float32)
        self.action_space = action_space or BOX
        self.terminates = terminates
        self.received: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.x = 0, 0.5
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.received.append(action)
        self.steps += 1
        self.x += float(np.mean(action))
        ends = self.steps == 3
        return self._observe(), -abs(self.x), ends and self.terminates, ends and not self.terminates, {}

    def _observe(self) -> np.ndarray:
        return np.array([np.clip(self.x, -10, 10), self.steps], np.float32)


def walk(n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: Walk(**kwargs)] * n_envs)


def make(env: Any = None, policy: Any = "MlpPolicy", **kwargs: Any) -> ClipPPO:
    small = {"n_steps": N_STEPS, "batch_size": 4, "n_epochs": 2, "seed": 0, "policy_kwargs": {"net_arch": [4]}}
    small |= {"clip_range": "lin_0.2", "clip_range_vf": 1.0}
    return ClipPPO(policy, env if env is not None else walk(), device="cpu", **{**small, **kwargs})


def learn(model: ClipPPO, total_timesteps: float, **kwargs: Any) -> list[dict[str, Any]]:
    """Return what each update logged."""
    logs: list[dict[str, Any]] = []
    train = model.train

    def logged() -> None:
        train()
        logs.append(dict(model.logger.name_to_value))

    model.train = logged  # type: ignore[method-assign]
    try:
        model.learn(total_timesteps, log_interval=None, **kwargs)
    finally:
        del model.train
    return logs


def column(logs: list[dict[str, Any]], key: str) -> list[float]:
    return [log[key] for log in logs]


def weights(model: ClipPPO) -> dict[str, th.Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def same(ours: dict[str, th.Tensor], theirs: dict[str, th.Tensor]) -> bool:
    return all(th.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[UpdateCoefficients]:
    """Record the coefficients of each update."""
    seen: list[UpdateCoefficients] = []

    def watch(engine: type[Any]) -> None:
        update = engine.update

        def spy(self: Any, buffer: Any, coefficients: UpdateCoefficients) -> Any:
            seen.append(coefficients)
            return update(self, buffer, coefficients)

        monkeypatch.setattr(engine, "update", spy)

    watch(AutogradEngine)
    watch(NativeEngine)
    return seen


class At(BaseCallback):
    """Calls a function with the model at the end of one rollout, before its update."""

    def __init__(self, rollout: int, action: Callable[[Any], None]) -> None:
        super().__init__()
        self.rollout, self.action, self.n_rollouts = rollout, action, 0

    def _on_rollout_end(self) -> None:
        self.n_rollouts += 1
        if self.n_rollouts == self.rollout:
            self.action(self.model)

    def _on_step(self) -> bool:
        return True


class TestInterface:
    def test_sb3s_arguments_come_first_in_sb3s_order(self) -> None:
        ours, theirs = inspect.signature(ClipPPO).parameters, inspect.signature(PPO).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        extra = [parameter for name, parameter in ours.items() if name not in theirs]
        assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in extra)
        assert {name: ours[name].default for name in theirs} == {name: theirs[name].default for name in theirs}

    def test_defaults(self) -> None:
        defaults = {name: p.default for name, p in inspect.signature(ClipPPO).parameters.items()}
        expected = {
            "clip_range": 0.2,
            "clip_range_vf": None,
            "kl_coef": 0.0,
            "adaptive_kl_target": None,
            "vf_clip": "max",
            "vf_clip_units": "return_std",
            "advantage_scope": "minibatch",
            "lr_kl_target": None,
            "engine": "auto",
        }
        assert {name: defaults[name] for name in expected} == expected

    def test_sb3_equivalent_sets_each_argument_of_ours(self) -> None:
        ours, theirs = inspect.signature(ClipPPO).parameters, inspect.signature(PPO).parameters
        differing = {name for name in ours if name not in theirs or ours[name].default != theirs[name].default}
        assert set(SB3_EQUIVALENT) == {*differing, "clip_range", "clip_range_vf"}
        assert all(SB3_EQUIVALENT[name] == theirs[name].default for name in SB3_EQUIVALENT if name in theirs)

    def test_learn_adds_one_argument_at_the_end(self) -> None:
        ours, theirs = list(inspect.signature(ClipPPO.learn).parameters), list(inspect.signature(PPO.learn).parameters)
        assert ours == [*theirs, "schedule_timesteps"]

    @pytest.mark.parametrize(
        "action_space",
        [
            spaces.Discrete(3),
            spaces.MultiDiscrete([2, 3]),
            spaces.MultiBinary(3),
            spaces.Box(-1.0, 1.0, (2,), np.float32),
        ],
        ids=str,
    )
    def test_every_action_space_learns_with_all_terms_and_controllers(self, action_space: spaces.Space[Any]) -> None:
        model = make(walk(2, action_space=action_space), kl_coef=1.0, adaptive_kl_target=0.01, lr_kl_target=0.01)
        before = weights(model)
        model.learn(2 * N_STEPS * 2)
        assert not same(weights(model), before)
        assert action_space.contains(model.predict(np.zeros(2, np.float32))[0])

    @pytest.mark.parametrize("policy", ["MlpPolicy", "SquashedMlpPolicy"])
    def test_an_environment_may_be_given_by_its_id(self, policy: str) -> None:
        make("Pendulum-v1", policy).learn(N_STEPS)


class TestProgress:
    def test_schedules_fall_with_progress(self) -> None:
        logs = learn(make(clip_range="lin_0.2", learning_rate="lin_0.001"), 4 * N_STEPS)
        # SB3 counts the rollout before it updates: 3/4, 1/2, 1/4, 0
        assert column(logs, "train/clip_range") == pytest.approx([0.15, 0.1, 0.05, 0], abs=EXACT)
        assert column(logs, "train/learning_rate") == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0], abs=EXACT)

    def test_progress_below_zero_at_the_last_update_is_clamped(self) -> None:
        """20 steps take 3 rollouts of 8: the last update comes at progress 1 - 24/20."""
        seen: list[float] = []
        model = make(clip_range="lin_0.2", learning_rate="lin_0.001", ent_coef=lambda p: seen.append(p) or 0.0)
        logs = learn(model, 20)
        assert column(logs, "train/clip_range") == pytest.approx([0.12, 0.04, 0], abs=EXACT)
        assert column(logs, "train/learning_rate") == pytest.approx([6e-4, 2e-4, 0], abs=EXACT)
        assert min(seen) == 0
        # Read by callbacks, and by schedules that they set
        assert model._current_progress_remaining == 0

    def test_every_coefficient_may_be_a_schedule(self, given: list[UpdateCoefficients]) -> None:
        model = make(
            clip_range="lin_0.4",
            clip_range_vf="lin_8",
            vf_clip_units="absolute",
            ent_coef="cos_2",
            vf_coef=lambda p: 1 + p,
            kl_coef="exp_3",
        )
        model.learn(2 * N_STEPS)
        # Progress 1/2 and 0; 3 * 100^(-1/2) = 0.3
        first = UpdateCoefficients(clip_range=0.2, clip_range_vf=4.0, ent_coef=1.0, vf_coef=1.5, kl_coef=0.3)
        last = UpdateCoefficients(clip_range=0.0, clip_range_vf=0.0, ent_coef=0.0, vf_coef=1.0, kl_coef=0.03)
        for ours, expected in zip(given, [first, last], strict=True):
            assert vars(ours) == pytest.approx(vars(expected), abs=EXACT)

    def test_the_learning_rate_reaches_the_optimizer(self) -> None:
        model = make(learning_rate="lin_0.001")
        model.learn(4 * N_STEPS, callback=At(2, lambda m: None))
        assert model.policy.optimizer.param_groups[0]["lr"] == 0

    def test_schedule_timesteps_spans_several_calls(self) -> None:
        kwargs: dict[str, Any] = {"learning_rate": "lin_0.001", "clip_range": "cos_0.2", "ent_coef": "exp_0.01"}
        whole = make(**kwargs)
        expected = learn(whole, 6 * N_STEPS)
        parts = make(**kwargs)
        logs = learn(parts, 2 * N_STEPS, schedule_timesteps=6 * N_STEPS)
        logs += learn(parts, 1 * N_STEPS, reset_num_timesteps=False)
        logs += learn(parts, 3 * N_STEPS, reset_num_timesteps=False)
        for key in ("train/learning_rate", "train/clip_range"):
            assert column(logs, key) == column(expected, key)
        assert same(weights(parts), weights(whole))

    def test_without_schedule_timesteps_schedules_end_with_each_call_as_in_sb3(self) -> None:
        model = make(learning_rate="lin_0.001")
        logs = learn(model, 2 * N_STEPS) + learn(model, 2 * N_STEPS, reset_num_timesteps=False)
        # The second call counts to 4 rollouts in all: 1 - 3/4, 1 - 4/4
        assert column(logs, "train/learning_rate") == pytest.approx([5e-4, 0, 2.5e-4, 0], abs=EXACT)

    def test_a_new_training_resets_the_horizon(self) -> None:
        model = make(learning_rate="lin_0.001")
        learn(model, N_STEPS, schedule_timesteps=4 * N_STEPS)
        assert column(learn(model, 2 * N_STEPS), "train/learning_rate") == pytest.approx([5e-4, 0], abs=EXACT)

    @pytest.mark.parametrize("arguments", [{"schedule_timesteps": 8 * N_STEPS}, {}])
    def test_a_refused_call_keeps_the_horizon(self, arguments: dict[str, Any]) -> None:
        model = make(learning_rate="lin_0.001")
        learn(model, N_STEPS, schedule_timesteps=4 * N_STEPS)
        with pytest.raises(ValueError, match="`log_interval` must be"):
            model.learn(N_STEPS, log_interval=0, **arguments)
        logs = learn(model, N_STEPS, reset_num_timesteps=False)
        assert column(logs, "train/learning_rate") == pytest.approx([5e-4], abs=EXACT)

    def test_schedules_keep_their_end_value_beyond_the_horizon(self) -> None:
        model = make(learning_rate=lambda p: 1e-3 * (1 + p))
        logs = learn(model, 3 * N_STEPS, schedule_timesteps=2 * N_STEPS)
        assert column(logs, "train/learning_rate") == pytest.approx([1.5e-3, 1e-3, 1e-3], abs=EXACT)

    @pytest.mark.parametrize("total", [16.0, 1.6e1, np.float32(16), np.int64(16)])
    def test_whole_floats_count_as_steps(self, total: Any) -> None:
        model = make().learn(total, schedule_timesteps=2 * total)
        assert (model.num_timesteps, model._total_timesteps) == (16, 16)
        assert type(model._total_timesteps) is int
        assert model._current_progress_remaining == 0.5

    def test_zero_steps_train_nothing(self) -> None:
        model = make()
        before = weights(model)
        assert model.learn(0).num_timesteps == 0
        assert same(weights(model), before)

    def test_schedules_and_horizon_are_saved_and_loaded(self, tmp_path: Path) -> None:
        model = make(learning_rate="lin_0.001", clip_range=lambda p: 0.1 + p)
        learn(model, N_STEPS, schedule_timesteps=4 * N_STEPS)
        model.save(tmp_path / "model")
        loaded = ClipPPO.load(tmp_path / "model", env=walk(), device="cpu", trust_pickle=True)  # for the lambda
        logs = learn(loaded, N_STEPS, reset_num_timesteps=False)
        assert column(logs, "train/learning_rate") == pytest.approx([5e-4], abs=EXACT)
        assert column(logs, "train/clip_range") == pytest.approx([0.6], abs=EXACT)


class TestChangesDuringTraining:
    """Callbacks of other packages set attributes of the model; the next update honours them."""

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("clip_range", 0.05, 0.05),
            ("clip_range", lambda p: 0.3 * p, 0.15),
            ("clip_range", "const_0.01", 0.01),
            ("clip_range", None, None),
            ("ent_coef", 0.02, 0.02),
            ("vf_coef", 0.9, 0.9),
            ("kl_coef", 2, 2.0),
        ],
    )
    def test_coefficients(self, given: list[UpdateCoefficients], name: str, value: Any, expected: float | None) -> None:
        make().learn(4 * N_STEPS, callback=At(2, lambda model: setattr(model, name, value)))
        assert getattr(given[0], name) != expected
        assert getattr(given[1], name) == expected

    def test_without_a_clip_range_its_statistics_are_not_logged(self) -> None:
        logs = learn(make(clip_range=None, clip_range_vf=None), N_STEPS)
        absent = {"train/clip_range", "train/clip_fraction", "train/clip_range_vf", "train/vf_clip_fraction"}
        assert not absent & set(logs[0])

    def test_a_bad_value_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"`clip_range` must be positive and finite, got -1"):
            make().learn(2 * N_STEPS, callback=At(1, lambda model: setattr(model, "clip_range", -1)))

    @pytest.mark.parametrize("name", ["vf_clip", "vf_clip_units", "advantage_scope"])
    def test_an_unknown_choice_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"`{name}` must be one of .*, got 'typo'"):
            make().learn(2 * N_STEPS, callback=At(1, lambda model: setattr(model, name, "typo")))

    def test_targets_of_controllers(self) -> None:
        model = make(kl_coef=1.0, adaptive_kl_target=0.1, lr_kl_target=0.2, learning_rate=1e-3)
        betas = []

        def change(model: Any) -> None:
            model.adaptive_kl_target, model.lr_kl_target = 0.3, 0.4
            betas.append(model.adaptive_kl.beta)

        model.learn(2 * N_STEPS, callback=At(2, change))
        assert (model.adaptive_kl.target, model.adaptive_lr.target) == (0.3, 0.4)
        # The first update was far below its target: beta was halved once, and continues from there.
        assert betas == [0.5]
        assert model.adaptive_kl.beta == 0.25

    def test_a_controller_can_be_switched_off(self, given: list[UpdateCoefficients]) -> None:
        model = make(kl_coef=1.0, adaptive_kl_target=0.1)
        model.learn(2 * N_STEPS, callback=At(2, lambda model: setattr(model, "adaptive_kl_target", None)))
        assert model.adaptive_kl is None
        assert [coefficients.kl_coef for coefficients in given] == [1.0, 1.0]

    def test_settings_of_the_engine(self) -> None:
        model = make()
        learn(model, 2 * N_STEPS, callback=At(2, lambda m: setattr(m, "n_epochs", 5)))
        # 2 epochs, then 5
        assert model._n_updates == 7

    @pytest.mark.parametrize(
        ("name", "value", "trust"),
        [
            ("learning_rate", 0.5, False),
            ("learning_rate", "const_0.5", False),
            ("lr_schedule", FloatSchedule(0.5), False),
            ("lr_schedule", lambda p: np.float64(0.5), True),
        ],
    )
    def test_the_learning_rate_that_runs_is_saved(self, name: str, value: Any, trust: bool, tmp_path: Path) -> None:
        model = make(engine="autograd")
        logs = learn(model, 2 * N_STEPS, callback=At(2, lambda model: setattr(model, name, value)))
        model.save(tmp_path / "model")
        loaded = ClipPPO.load(tmp_path / "model", env=walk(), device="cpu", trust_pickle=trust)
        logs += learn(loaded, N_STEPS, reset_num_timesteps=False)
        assert column(logs, "train/learning_rate") == [3e-4, 0.5, 0.5]

    @pytest.mark.parametrize(
        ("name", "value", "as_in_sb3", "rate", "beta"),
        [
            ("learning_rate", 2e-3, False, 2e-3, 0.5),
            ("learning_rate", 1e-3, False, 1.5e-3, 0.5),  # the same number
            ("learning_rate", 1e-3, True, 1e-3, 0.5),
            ("learning_rate", 2e-3, True, 2e-3, 0.5),
            ("kl_coef", 3.0, False, 1.5e-3, 3.0),
        ],
    )
    def test_a_controller_starts_again_from_another_initial_value(
        self, name: str, value: float, as_in_sb3: bool, rate: float, beta: float, tmp_path: Path
    ) -> None:
        # Targets far above the KL of an update, which halves beta and raises the rate by half
        model = make(kl_coef=1.0, adaptive_kl_target=9.0, lr_kl_target=9.0, learning_rate=1e-3, engine="autograd")
        model.learn(N_STEPS)
        setattr(model, name, value)
        if as_in_sb3:
            model._setup_lr_schedule()
            assert model.lr_schedule(1.0) == value
        model.save(tmp_path / "model")
        for each in (model, ClipPPO.load(tmp_path / "model", env=walk(), device="cpu")):
            logs = learn(each, 2 * N_STEPS, reset_num_timesteps=False)
            assert column(logs, "train/learning_rate") == pytest.approx([rate, 1.5 * rate], rel=EXACT)
            assert column(logs, "train/kl_coef") == [beta, beta / 2]

    @pytest.mark.parametrize(("value", "rule"), [(0.5, r"in \[1e-05, 0.01\]"), (lambda p: 1e-3, "a number")])
    def test_a_bad_initial_rate_of_a_controller_is_refused(self, value: Any, rule: str) -> None:
        model = make(lr_kl_target=0.1, engine="autograd")
        with pytest.raises(ValueError, match=f"`learning_rate` must be {rule} if `lr_kl_target` is set, got"):
            model.learn(2 * N_STEPS, callback=At(1, lambda model: setattr(model, "lr_schedule", value)))

    @pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
    @pytest.mark.parametrize("owner", ["model", "model.rollout_buffer"])
    def test_discounts(self, name: str, owner: str, tmp_path: Path) -> None:
        model = make(engine="autograd")
        part: Any = model if owner == "model" else model.rollout_buffer
        model.learn(N_STEPS, callback=At(1, lambda _: setattr(part, name, 0.5)))
        model.save(tmp_path / "model")
        assert getattr(ClipPPO.load(tmp_path / "model", device="cpu"), name) == 0.5
        model.learn(N_STEPS, reset_num_timesteps=False)
        assert getattr(model, name) == getattr(model.rollout_buffer, name) == 0.5
        setattr(model, name, 0.25)
        model.learn(N_STEPS, reset_num_timesteps=False)
        assert getattr(model, name) == getattr(model.rollout_buffer, name) == 0.25

    def test_a_buffer_of_the_user_keeps_its_discounts(self) -> None:
        class Own(TensorRolloutBuffer):
            pass

        model = make(rollout_buffer_class=Own, engine="autograd")
        model.learn(2 * N_STEPS, callback=At(1, lambda model: setattr(model, "gamma", 0.5)))
        assert (model.gamma, model.rollout_buffer.gamma) == (0.5, 0.99)


class TestValueRange:
    def test_in_standard_deviations_of_the_returns(self) -> None:
        model = make(clip_range_vf=0.5)
        logs = learn(model, N_STEPS)
        assert column(logs, "train/clip_range_vf") == [0.5 * float(np.std(model.rollout_buffer.returns))]

    def test_counts_in_return_units_if_asked(self) -> None:
        logs = learn(make(clip_range_vf=0.5, vf_clip_units="absolute"), N_STEPS)
        assert column(logs, "train/clip_range_vf") == [0.5]

    def test_scaling_the_rewards_scales_the_range(self) -> None:
        class Scaled(gym.RewardWrapper):  # type: ignore[type-arg]
            def reward(self, reward: Any) -> float:
                return 1000.0 * float(reward)

        env = DummyVecEnv([lambda: Scaled(Walk())])
        # Each model is made just before its training, since it seeds the random states of the process.
        plain = learn(make(engine="autograd"), N_STEPS)[0]
        scaled = learn(make(env, engine="autograd"), N_STEPS)[0]
        # Bootstrapped values do not scale with the rewards
        assert 800 < scaled["train/clip_range_vf"] / plain["train/clip_range_vf"] < 1200


TRAIN_KEYS = {
    "approx_kl", "clip_fraction", "clip_range", "clip_range_vf", "entropy_loss", "explained_variance", "grad_norm",
    "kl", "kl_coef", "learning_rate", "loss", "n_updates", "policy_gradient_loss", "ratio_max", "std", "value_loss",
    "vf_clip_fraction",
}  # fmt: skip


class TestLogs:
    def test_keys(self) -> None:
        logs = learn(make(), N_STEPS)
        seen = {key.removeprefix("train/") for key in logs[0] if key.startswith("train/")}
        assert seen == TRAIN_KEYS
        assert logs[0]["time/rollout_seconds"] > 0
        assert logs[0]["time/update_seconds"] > 0

    def test_discrete_actions_have_no_std(self) -> None:
        assert "train/std" not in learn(make(walk(action_space=spaces.Discrete(2))), N_STEPS)[0]

    def test_every_value_is_a_plain_number(self) -> None:
        for key, value in learn(make(kl_coef=1.0, adaptive_kl_target=0.01), N_STEPS)[0].items():
            assert isinstance(value, (int, float)), key
            assert not isinstance(value, np.generic), key

    def test_exact_kl_before_each_step_of_the_last_epoch(self) -> None:
        one = learn(make(n_epochs=1, batch_size=N_STEPS), N_STEPS)[0]
        # One minibatch, seen before the only step: nothing has moved but float32 rounding
        assert one["train/kl"] == pytest.approx(0, abs=1e-6)
        assert learn(make(n_epochs=2, batch_size=N_STEPS, learning_rate=0.01), N_STEPS)[0]["train/kl"] > 1e-4

    def test_exact_kl_is_known_without_a_penalty(self) -> None:
        penalised, plain = learn(make(kl_coef=1e-9), N_STEPS)[0], learn(make(), N_STEPS)[0]
        assert plain["train/kl"] == pytest.approx(penalised["train/kl"], rel=1e-4)
        assert plain["train/kl"] > 0

    def test_kl_after_the_update_is_measured_for_controllers_only(self) -> None:
        assert "train/kl_after_update" not in learn(make(kl_coef=1.0), N_STEPS)[0]
        assert learn(make(lr_kl_target=0.01), N_STEPS)[0]["train/kl_after_update"] > 0

    def test_largest_ratio_and_number_of_epochs(self) -> None:
        logs = learn(make(), 3 * N_STEPS)
        assert all(ratio > 1 for ratio in column(logs, "train/ratio_max"))
        assert column(logs, "train/n_updates") == [2, 4, 6]

    def test_they_are_written_to_the_loggers_outputs_with_sb3s(self, tmp_path: Path) -> None:
        from stable_baselines3.common.logger import configure

        model = make(gym.wrappers.RecordEpisodeStatistics(Walk()))
        model.set_logger(configure(str(tmp_path), ["json"]))
        model.learn(3 * N_STEPS)
        model.logger.close()
        written = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
        # SB3 writes after each rollout, with the update before it
        assert len(written) == 3
        assert {f"train/{key}" for key in TRAIN_KEYS} <= set(written[1])
        assert {"time/fps", "time/iterations", "time/total_timesteps", "time/rollout_seconds"} <= set(written[0])


def beta_after(beta: float, kl: float, target: float) -> float:
    """Section 4 of the paper."""
    return 2 * beta if kl > 1.5 * target else beta / 2 if kl < target / 1.5 else beta


def rate_after(rate: float, kl: float, target: float) -> float:
    return rate / 1.5 if kl > 2 * target else rate * 1.5 if kl < target / 2 else rate


class TestControllers:
    @pytest.mark.parametrize("target", [1e-7, 0.5])
    def test_beta_follows_the_kl_and_applies_to_the_next_update(self, target: float) -> None:
        model = make(kl_coef=1.0, adaptive_kl_target=target, clip_range=None)
        logs = learn(model, 5 * N_STEPS)
        betas, kls = column(logs, "train/kl_coef"), column(logs, "train/kl_after_update")
        assert betas[0] == 1.0
        assert model.adaptive_kl is not None
        assert [*betas[1:], model.adaptive_kl.beta] == [
            beta_after(b, k, target) for b, k in zip(betas, kls, strict=True)
        ]
        # A target far too low raises it, one far too high lowers it
        assert betas[-1] == (16 if target < 0.1 else 1 / 16)

    @pytest.mark.parametrize("target", [1e-7, 0.5])
    def test_learning_rate_follows_the_kl_and_applies_to_the_next_update(self, target: float) -> None:
        model = make(learning_rate=1e-3, lr_kl_target=target)
        logs = learn(model, 4 * N_STEPS)
        rates, kls = column(logs, "train/learning_rate"), column(logs, "train/kl_after_update")
        assert rates[0] == 1e-3
        assert model.adaptive_lr is not None
        assert [*rates[1:], model.adaptive_lr.learning_rate] == [
            rate_after(r, k, target) for r, k in zip(rates, kls, strict=True)
        ]
        assert rates[-1] == pytest.approx(1e-3 * 1.5 ** (-3 if target < 0.1 else 3), rel=EXACT)
        # The optimizer still has the rate of the last update
        assert model.policy.optimizer.param_groups[0]["lr"] == rates[-1]

    def test_a_schedule_of_the_zoo_may_adapt(self) -> None:
        from stable_baselines3.common.utils import FloatSchedule

        assert make(learning_rate=FloatSchedule(1e-3), lr_kl_target=0.01).adaptive_lr == KLAdaptiveLR(1e-3, 0.01)

    def test_the_penalty_lowers_the_kl(self) -> None:
        kls = []
        for kl_coef in (0.0, 100.0):
            model = make(n_epochs=10, learning_rate=3e-3, clip_range=None, kl_coef=kl_coef, lr_kl_target=0.01)
            kls.append(learn(model, N_STEPS)[0]["train/kl_after_update"])
        assert kls[1] < 0.5 * kls[0]

    def test_both_start_from_their_arguments(self) -> None:
        model = make(learning_rate=5e-4, kl_coef="const_3", adaptive_kl_target=0.02, lr_kl_target=0.03)
        assert model.adaptive_kl == AdaptiveKL(beta=3.0, target=0.02)
        assert model.adaptive_lr == KLAdaptiveLR(learning_rate=5e-4, target=0.03)
        assert make().adaptive_kl is None
        assert make().adaptive_lr is None


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """Return the file of a model whose controllers have left their initial values."""
        model = make(kl_coef=1.0, learning_rate=1e-3, adaptive_kl_target=1e-7, lr_kl_target=1e-7)
        model.learn(2 * N_STEPS)
        assert model.adaptive_kl == AdaptiveKL(beta=4.0, target=1e-7)
        assert model.adaptive_lr is not None
        assert model.adaptive_lr.learning_rate == pytest.approx(1e-3 / 1.5**2)
        model.save(tmp_path / "model")
        return tmp_path / "model.zip"

    def test_controllers_keep_their_state(self, path: Path) -> None:
        loaded = ClipPPO.load(path, env=walk(), device="cpu")
        logs = learn(loaded, N_STEPS)
        assert column(logs, "train/kl_coef") == [4.0]
        assert column(logs, "train/learning_rate") == pytest.approx([1e-3 / 1.5**2])

    def test_controllers_keep_their_bounds(self, tmp_path: Path) -> None:
        model = make(kl_coef=1.0, adaptive_kl_target=0.01, lr_kl_target=0.01)
        model.adaptive_kl = AdaptiveKL(beta=2.0, target=0.01, beta_max=8.0)
        model.adaptive_lr = KLAdaptiveLR(learning_rate=1e-4, target=0.01, lr_max=1e-3)
        model.save(tmp_path / "model")
        loaded = ClipPPO.load(tmp_path / "model", device="cpu")
        assert (loaded.adaptive_kl, loaded.adaptive_lr) == (model.adaptive_kl, model.adaptive_lr)

    @pytest.mark.parametrize(
        ("changes", "beta", "rate"),
        [
            ({"kl_coef": 3.0}, 3.0, 1e-3 / 1.5**2),
            ({"adaptive_kl_target": None}, None, 1e-3 / 1.5**2),
            ({"adaptive_kl_target": 0.5}, 4.0, 1e-3 / 1.5**2),
            ({"learning_rate": 2e-4}, 4.0, 2e-4),
            ({"lr_kl_target": None}, 4.0, None),
            ({"lr_kl_target": None, "learning_rate": "lin_0.002"}, 4.0, None),
            ({"custom_objects": {"learning_rate": 2e-4, "kl_coef": 3.0}}, 3.0, 2e-4),
            ({"custom_objects": {"learning_rate": 1e-3, "kl_coef": 1.0}}, 4.0, 1e-3 / 1.5**2),  # the file's
            ({"custom_objects": {"learning_rate": 5e-4}, "learning_rate": 2e-4}, 4.0, 2e-4),
            ({"custom_objects": {"learning_rate": 0.0}}, 4.0, 1e-3 / 1.5**2),  # as the Zoo does to evaluate
            ({"custom_objects": {"learning_rate": 0.0}, "learning_rate": 2e-4}, 4.0, 2e-4),
        ],
    )
    def test_arguments_of_load_change_them(
        self, path: Path, changes: dict[str, Any], beta: float | None, rate: float | None
    ) -> None:
        loaded = ClipPPO.load(path, env=walk(), device="cpu", **changes)
        assert (loaded.adaptive_kl.beta if loaded.adaptive_kl else None) == beta
        assert (loaded.adaptive_lr.learning_rate if loaded.adaptive_lr else None) == (rate and pytest.approx(rate))
        if loaded.adaptive_kl:
            assert loaded.adaptive_kl.target == changes.get("adaptive_kl_target", 1e-7)
        logs = learn(loaded, 2 * N_STEPS)
        # Without controllers, the arguments apply: the file's kl_coef 1, and the file's or the new learning rate
        assert logs[0]["train/kl_coef"] == (beta or 1.0)
        fixed_rate = 1e-3 if changes.get("learning_rate") is None else 0.002 / 2
        assert logs[0]["train/learning_rate"] == pytest.approx(rate or fixed_rate)

    def test_predictions_and_arguments_are_saved_and_loaded(self, tmp_path: Path) -> None:
        model = make(
            clip_range="cos_0.3", clip_range_vf=None, vf_clip="prediction", vf_clip_units="absolute", engine="autograd"
        )
        model.learn(N_STEPS)
        model.save(tmp_path / "model")
        loaded = ClipPPO.load(tmp_path / "model", device="cpu")
        obs = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
        np.testing.assert_array_equal(
            loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0]
        )
        for name in ("clip_range", "clip_range_vf", "vf_clip", "vf_clip_units", "engine", "n_steps", "batch_size"):
            assert getattr(loaded, name) == getattr(model, name)

    def test_what_load_rebuilds_is_not_in_the_file(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            names = json.loads(archive.read("data")).keys()
        assert not {"_engine", "_schedules", "_loads_sb3", "rollout_buffer", "policy"} & set(names)
        assert {"adaptive_kl", "adaptive_lr", "_schedule_timesteps"} <= set(names)

    def test_open_files_and_other_numbers_of_environments(self) -> None:
        file = io.BytesIO()
        make(walk(1)).save(file)
        file.seek(0)
        loaded = ClipPPO.load(file, env=walk(2), device="cpu")
        loaded.learn(2 * N_STEPS)
        assert loaded.rollout_buffer.values.shape == (N_STEPS, 2)
        assert loaded.num_timesteps == 2 * N_STEPS

    def test_a_model_without_environment_predicts(self) -> None:
        model = make()
        file = io.BytesIO()
        model.save(file)
        file.seek(0)
        loaded = ClipPPO.load(file, device="cpu")
        assert loaded.predict(np.zeros(2, np.float32))[0].shape == (2,)


class Counting(Walk):
    """The walk with integer observations."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-10, 10, (2,), np.int64)

    def _observe(self) -> Any:
        return np.array([np.clip(9 * self.x, -10, 10), self.steps], np.int64)


class KeyedCounting(Counting):
    """The same observations under two keys."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict({"a": self.observation_space, "b": self.observation_space})

    def _observe(self) -> Any:
        return dict.fromkeys("ab", super()._observe())


class TestSetEnv:
    @pytest.mark.parametrize("engine", ["native", "autograd"])
    @pytest.mark.parametrize("cls", [VecNormalize, FastVecNormalize])
    def test_normalised_whole_numbers_are_handled_as_in_load(self, cls: type[Any], engine: str) -> None:
        file = io.BytesIO()
        make(DummyVecEnv([Counting]), engine=engine).save(file)
        loaded = ClipPPO.load(file, env=cls(DummyVecEnv([Counting])), device="cpu")
        learn(loaded, 2 * N_STEPS)
        model = ClipPPO.load(file, env=DummyVecEnv([Counting]), device="cpu")
        model.set_env(cls(DummyVecEnv([Counting])))
        learn(model, 2 * N_STEPS)
        assert model.rollout_buffer.observations.dtype == np.float32
        assert same(weights(model), weights(loaded))
        # And back.
        model.set_env(DummyVecEnv([Counting]))
        learn(model, N_STEPS)
        assert model.rollout_buffer.observations.dtype == np.int64

    def test_after_a_training(self) -> None:
        model = make(DummyVecEnv([Counting]))
        learn(model, N_STEPS)
        model.set_env(VecNormalize(DummyVecEnv([Counting])))
        learn(model, N_STEPS)
        assert model.rollout_buffer.full

    def test_of_some_keys(self) -> None:
        model = make(DummyVecEnv([KeyedCounting]), "MultiInputPolicy")
        model.set_env(VecNormalize(DummyVecEnv([KeyedCounting]), norm_obs_keys=["a"]))
        learn(model, N_STEPS)
        assert {key: rows.dtype for key, rows in model.rollout_buffer.observations.items()} == {
            "a": np.float32,
            "b": np.int64,
        }

    def test_the_buffer_is_kept_if_it_fits(self) -> None:
        model = make()
        buffer = model.rollout_buffer
        for env in (walk(), VecNormalize(walk())):
            model.set_env(env)
            assert model.rollout_buffer is buffer


class Spy(BaseCallback):
    """Records what a callback sees."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after
        self.events: list[str] = []
        self.names: set[str] = set()
        self.copies: list[np.ndarray] = []
        self.arrays: list[np.ndarray] = []
        self.ends: list[list[bool]] = []

    def _on_training_start(self) -> None:
        self.events.append("training_start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout_start")

    def _on_step(self) -> bool:
        self.events.append("step")
        self.names |= set(self.locals)
        self.copies.append(self.locals["rewards"].copy())
        self.arrays.append(self.locals["rewards"])
        self.ends.append([info.get("TimeLimit.truncated", False) for info in self.locals["infos"]])
        return len(self.arrays) != self.stop_after

    def _on_rollout_end(self) -> None:
        self.events.append("rollout_end")

    def _on_training_end(self) -> None:
        self.events.append("training_end")


class TestCallbacks:
    def test_events_come_in_sb3s_order(self) -> None:
        spy = Spy()
        make(n_steps=2, batch_size=2).learn(4, callback=spy)
        rollout = ["rollout_start", "step", "step", "rollout_end"]
        assert spy.events == ["training_start", *rollout, *rollout, "training_end"]

    def test_locals_have_sb3s_names(self) -> None:
        ours, theirs = Spy(), Spy()
        make().learn(N_STEPS, callback=ours)
        host = PPO("MlpPolicy", walk(), n_steps=N_STEPS, batch_size=4, device="cpu")
        host.learn(N_STEPS, callback=theirs)
        # Loop variables of SB3's bootstrapping, which is a function here
        assert theirs.names - ours.names <= {"idx", "done", "terminal_obs", "terminal_value"}
        assert {"rewards", "dones", "infos", "actions", "new_obs", "values", "log_probs", "obs_tensor"} <= ours.names

    def test_rewards_in_locals_are_not_changed_by_bootstrapping(self) -> None:
        spy = Spy()
        model = make(walk(2))
        model.learn(2 * N_STEPS, callback=spy)
        for copy, array in zip(spy.copies, spy.arrays, strict=True):
            np.testing.assert_array_equal(array, copy)
        # The rollout's rewards differ from them in the truncated steps, and only there
        assert np.array_equal(model.rollout_buffer.rewards != np.array(spy.copies), np.array(spy.ends))
        assert np.array(spy.ends).sum() == 2 * 2

    def test_returning_false_ends_training_before_the_update(self) -> None:
        model = make()
        before = weights(model)
        model.learn(2 * N_STEPS, callback=Spy(stop_after=3))
        assert model.num_timesteps == 3
        assert same(weights(model), before)

    def test_functions_are_callbacks_too(self) -> None:
        seen: list[int] = []
        make().learn(N_STEPS, callback=lambda local_names, _: seen.append(local_names["n_steps"]) is None)
        assert seen == list(range(N_STEPS))


class TestRollout:
    def test_environment_gets_clipped_actions_and_the_buffer_the_policys_own(self) -> None:
        env = walk()
        model = make(env, policy_kwargs={"net_arch": [4], "log_std_init": 1.0})
        model.learn(N_STEPS)
        received, own = np.array(env.envs[0].unwrapped.received), model.rollout_buffer.actions[:, 0]  # type: ignore[attr-defined]
        assert np.abs(own).max() > 1
        np.testing.assert_array_equal(received, np.clip(own, -1, 1))

    def test_log_prob_is_of_the_policys_own_actions(self) -> None:
        model = make(policy_kwargs={"net_arch": [4], "log_std_init": 1.0}, learning_rate=0.0)
        model.learn(N_STEPS)
        batch = next(model.rollout_buffer.in_order(100))
        with th.no_grad():
            values, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        # Forward passes of one and of eight observations round differently
        th.testing.assert_close(batch.old_log_prob, log_prob, rtol=1e-5, atol=1e-6)
        th.testing.assert_close(batch.old_values, values.flatten(), rtol=1e-5, atol=1e-6)

    def test_old_distribution_is_stored_before_the_policy_moves(self) -> None:
        model = make(kl_coef=1.0, learning_rate=0.1)
        rows: list[th.Tensor] = []

        def expect(m: Any) -> None:
            with th.no_grad():
                obs = next(m.rollout_buffer.in_order(100)).observations
                rows.append(dist_params(m.policy.get_distribution(obs)))

        model.learn(N_STEPS, callback=At(1, expect))
        stored = next(model.rollout_buffer.in_order(100)).old_dist_params
        th.testing.assert_close(stored, rows[0], rtol=1e-5, atol=1e-6)

    def test_a_policy_that_bypasses_action_dist_stores_the_right_one(self) -> None:
        model = make(policy=OwnDistribution, kl_coef=1.0)
        obs: list[Any] = []
        expected: list[th.Tensor] = []

        def expect(m: Any) -> None:
            obs.append(next(m.rollout_buffer.in_order(100)).observations)
            with th.no_grad():
                expected.append(dist_params(m.policy.own(obs[0])[0]))

        logs = learn(model, N_STEPS, callback=At(1, expect))
        stored = next(model.rollout_buffer.in_order(100)).old_dist_params
        th.testing.assert_close(stored, expected[0], rtol=1e-5, atol=1e-6)
        assert 0 < logs[0]["train/kl"] < 0.1

    def test_a_policy_that_is_not_finite_is_refused_by_the_update(self) -> None:
        def spoil(model: Any) -> None:
            model.policy.log_std.data.fill_(float("nan"))

        with pytest.raises(ValueError, match="`policy_loss` must be finite, got nan .* cause: `log_std`, got nan at"):
            make().learn(2 * N_STEPS, callback=At(1, spoil))


class OwnDistribution(ActorCriticPolicy):
    """A custom policy that makes its own distribution at each call, and does not set ``action_dist``."""

    def own(self, obs: Any) -> tuple[DiagGaussianDistribution, th.Tensor]:
        latent_pi, latent_vf = self.mlp_extractor(self.extract_features(obs))
        dist = DiagGaussianDistribution(self.action_space.shape[0])
        return dist.proba_distribution(self.action_net(latent_pi), self.log_std), self.value_net(latent_vf)

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        dist, values = self.own(obs)
        actions = dist.get_actions(deterministic=deterministic)
        return actions, values, dist.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        dist, values = self.own(obs)
        return values, dist.log_prob(actions), dist.entropy()


class NoMemory:
    """No rollout fits into memory."""

    @pytest.fixture(autouse=True)
    def no_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))


class TestMemory(NoMemory):
    def test_a_rollout_that_does_not_fit_is_refused_by_the_constructor(self) -> None:
        with pytest.raises(ValueError, match=r"`n_steps` must be small enough .* got n_steps=8 with n_envs=1"):
            make()

    def test_a_model_that_only_predicts_needs_none(self) -> None:
        """`load` without an environment."""
        with pytest.MonkeyPatch.context() as patch:
            patch.undo()
            patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1e9))
            file = io.BytesIO()
            make().save(file)
        file.seek(0)
        assert ClipPPO.load(file, device="cpu").predict(np.zeros(2, np.float32))[0].shape == (2,)


class TestBuffers:
    def test_sb3s_class_works(self) -> None:
        model = make(rollout_buffer_class=RolloutBuffer, engine="autograd")
        logs = learn(model, 2 * N_STEPS)
        assert type(model.rollout_buffer) is RolloutBuffer
        # It does not store the old distribution
        assert "train/kl" not in logs[-1]
        ours = make(engine="autograd")
        learn(ours, 2 * N_STEPS)
        assert same(weights(model), weights(ours))

    def test_subclass_of_ours_gets_its_arguments_and_works_with_the_penalty(self) -> None:
        class Noted(TensorRolloutBuffer):
            def __init__(self, *args: Any, note: str, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.note = note

        model = make(rollout_buffer_class=Noted, rollout_buffer_kwargs={"note": "hello"}, kl_coef=1.0)
        logs = learn(model, N_STEPS)
        assert (model.rollout_buffer.note, model.rollout_buffer.dist_param_dim) == ("hello", 4)
        assert "train/kl" in logs[0]

    def test_rewards_that_a_callback_changes_are_used(self) -> None:
        """For example intrinsic rewards, which a callback adds at the end of a rollout."""

        def add(model: Any) -> None:
            model.rollout_buffer.rewards += 5.0
            model.rollout_buffer.compute_returns_and_advantage(th.zeros(1), np.ones(1, bool))

        plain, changed = make(), make()
        plain.learn(N_STEPS)
        changed.learn(N_STEPS, callback=At(1, add))
        assert not same(weights(plain), weights(changed))


class TestMessages:
    @pytest.fixture(autouse=True)
    def _kernels(self) -> None:
        warm_up("native")  # whose compilation would be a message, too

    def test_engine_and_memory_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="sb3_clipvf"):
            make().learn(2 * N_STEPS)
        engine = "Training runs on the engine 'native': it is the fastest for this policy"
        # 8 transitions of 8 bytes of observation, 8 of action, 6 float32 and 4 of the distribution: 448 bytes
        assert caplog.messages == ["The rollout of 8 x 1 steps takes 0.00 MiB", engine]

    def test_memory_is_logged_when_a_training_allocates_it(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        make().save(tmp_path / "model.zip")
        with caplog.at_level(logging.INFO, logger="sb3_clipvf"):
            model = ClipPPO.load(tmp_path / "model.zip", env=make().env, device="cpu")
            assert caplog.messages == []
            for _ in range(2):
                model.learn(N_STEPS, reset_num_timesteps=False)
        assert caplog.text.count("The rollout of 8 x 1 steps takes") == 1

    def test_early_stopping_is_logged_and_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        model = make(target_kl=1e-9, learning_rate=0.01, n_epochs=5)
        with caplog.at_level(logging.INFO, logger="sb3_clipvf"):
            model.learn(N_STEPS)
        assert "Early stopping at step 0 due to reaching max kl: 0.0" in caplog.text
        assert model._n_updates == 1

    def test_verbose_shows_them_on_standard_output(self, capsys: pytest.CaptureFixture[str]) -> None:
        make(verbose=1).learn(N_STEPS)
        assert "Training runs on the engine 'native'" in capsys.readouterr().out

    def test_silent_by_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        make().learn(N_STEPS)
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", "")

    def test_a_configured_logger_is_not_changed(self, capsys: pytest.CaptureFixture[str]) -> None:
        log = logging.getLogger("sb3_clipvf")
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        log.addHandler(handler)
        log.setLevel(logging.WARNING)
        make(verbose=2).learn(3 * N_STEPS)
        assert (log.handlers[-1], log.level, records) == (handler, logging.WARNING, [])
        assert "MiB" not in capsys.readouterr().out

    @pytest.mark.parametrize("verbose", [1, 2])
    def test_several_models_add_one_handler(self, verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
        for _ in range(2):
            make(verbose=verbose).learn(N_STEPS)
        assert capsys.readouterr().out.count("The rollout of 8 x 1 steps") == 2

    def test_each_model_has_its_own_verbosity(self, capsys: pytest.CaptureFixture[str]) -> None:
        log = logging.getLogger("sb3_clipvf")
        before = (log.level, log.propagate, list(log.handlers))
        talking = make(verbose=1)
        talking.rollout_buffer.reset()
        assert "The rollout of 8 x 1 steps" in capsys.readouterr().out
        silent = make()
        silent.learn(N_STEPS)
        assert (log.level, log.propagate, list(log.handlers)) == before
        assert capsys.readouterr().out == ""
        talking.learn(N_STEPS)
        assert "Training runs on the engine" in capsys.readouterr().out
        # For loops in which the models take turns.
        talking.engine = silent.engine = "autograd"
        silent.train()
        assert capsys.readouterr().out == ""
        talking.train()
        assert "Training runs on the engine 'autograd'" in capsys.readouterr().out
        file = io.BytesIO()
        silent.save(file)
        loaded = ClipPPO.load(file, env=walk(), device="cpu")
        loaded.set_env(walk())
        assert capsys.readouterr().out == ""
        loaded.verbose = 1
        loaded.learn(N_STEPS)
        assert "Training runs on the engine 'autograd'" in capsys.readouterr().out

    @pytest.mark.parametrize("verbose", [1, 0])
    def test_the_users_own_log_gets_them_too(self, verbose: int, tmp_path: Path) -> None:
        root, handler = logging.getLogger(), logging.FileHandler(tmp_path / "log")
        root.addHandler(handler)
        try:
            make(verbose=verbose, learning_rate="lin_1e-3").learn(N_STEPS)
        finally:
            root.removeHandler(handler)
            handler.close()
        text = (tmp_path / "log").read_text()
        assert "schedules end with each call" in text
        assert ("Training runs on the engine" in text) == bool(verbose)

    @pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
    def test_what_the_users_log_shows_on_the_console_is_shown_once(
        self, level: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root, handler = logging.getLogger(), logging.StreamHandler()  # to stderr
        handler.setLevel(level)
        root.addHandler(handler)
        try:
            make(verbose=1).learn(N_STEPS)
        finally:
            root.removeHandler(handler)
        shown = [text.count("Training runs on the engine") for text in capsys.readouterr()]
        assert shown == ([0, 1] if level == logging.NOTSET else [1, 0])

    def test_a_level_that_is_set_later_is_not_changed(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = make(verbose=1)
        log = logging.getLogger("sb3_clipvf")
        log.setLevel(logging.WARNING)
        capsys.readouterr()
        model.learn(N_STEPS)
        assert "Training runs on" not in capsys.readouterr().out
        make()
        assert (log.level, log.handlers) == (logging.WARNING, [])
        model.learn(N_STEPS)
        assert log.level == logging.WARNING

    @pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING])
    def test_a_level_that_was_set_before_is_not_changed(self, level: int, capsys: pytest.CaptureFixture[str]) -> None:
        log = logging.getLogger("sb3_clipvf")
        log.setLevel(level)
        make(verbose=1).rollout_buffer.reset()
        assert log.level == level
        assert ("The rollout of" in capsys.readouterr().out) == (level == logging.DEBUG)
        make()
        assert (log.level, log.handlers) == (level, [])

    def test_a_warning_of_truncated_minibatches(self) -> None:
        message = (
            r"mini-batch size of 3, .* n_steps \* n_envs = 8 transitions, after every 2 untruncated mini-batches there "
            r"will be a truncated mini-batch of size 2\. We recommend a `batch_size` that is a factor "
            r".*n_steps=8, n_envs=1"
        )
        with pytest.warns(UserWarning, match=message):
            make(batch_size=3)

    def test_a_warning_of_minibatches_larger_than_the_rollout(self) -> None:
        message = (
            r"^You have specified a mini-batch size of 9, but the rollout has n_steps \* n_envs = 8 transitions: each "
            r"epoch is one minibatch of 8 \(n_steps=8, n_envs=1\)\.$"
        )
        with pytest.warns(UserWarning, match=message):
            make(batch_size=9)

    def test_a_warning_of_a_last_minibatch_of_one(self) -> None:
        with pytest.warns(UserWarning, match=r"of size 1\. It is not normalised, having no spread\. We recommend"):
            model = make(batch_size=7)
        logs = learn(model, N_STEPS)
        assert all(np.isfinite(value) for value in logs[0].values())
        with pytest.warns(UserWarning, match=r"of size 1\. We recommend"):
            make(batch_size=7, normalize_advantage=False)
