"""
Refusals of illegal input to ClipPPO, across modules, and the legal values next to it.

Each message must name the argument, the rule, the value and the hint: the patterns here span all four.
"""

import io
import math
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.vec_env import patch_gym

from sb3_clipvf import ClipPPO, TensorRolloutBuffer
from sb3_clipvf.common.validation import (
    check_bool,
    check_choice,
    check_class,
    check_device,
    check_float,
    check_int,
    check_keywords,
    check_type,
)

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
INFINITE_BOX = spaces.Box(-np.inf, np.inf, (2,), np.float32)
NAN, INF = math.nan, math.inf


class Still(gym.Env[Any, Any]):
    """An environment of any spaces in which nothing happens."""

    def __init__(self, observation_space: spaces.Space[Any] = BOX, action_space: spaces.Space[Any] = BOX) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


def make(env: Any = None, policy: Any = "MlpPolicy", **kwargs: Any) -> ClipPPO:
    small = {"n_steps": 8, "batch_size": 4, "n_epochs": 1, "device": "cpu"}
    return ClipPPO(policy, Still() if env is None else env, **{**small, **kwargs})


def refused(error: Any, *parts: str) -> Any:
    """Expect an error with these parts in this order, and a second sentence that states what to do."""
    return pytest.raises(error, match=r"(?s)^(?=.*\. \S)" + ".*?" + ".*".join(map(re.escape, parts)))


WHOLE, NUMBER = "must be a whole number", "must be a number"
AT_LEAST_1 = "must be a whole number of at least 1"
POSITIVE = "must be finite and above 0"
UNIT = "must be in [0, 1]"
ZERO_ONE_MORE = "must be at least 0 and finite"
SIZES = ("n_steps", "batch_size", "n_epochs")
SCHEDULE_TYPES = "must be a number, a function of progress or a string"

BAD: list[tuple[str, Any, type[Exception], str]] = [
    *[(name, value, TypeError, WHOLE) for name in SIZES for value in ("8", None, True, [8])],
    *[(name, value, ValueError, AT_LEAST_1) for name in SIZES for value in (0, -8, 2.5, NAN, INF)],
    ("stats_window_size", "100", TypeError, WHOLE),
    ("stats_window_size", 0, ValueError, AT_LEAST_1),
    ("sde_sample_freq", None, TypeError, WHOLE),
    ("sde_sample_freq", -2, ValueError, "must be a whole number of at least -1"),
    ("sde_sample_freq", 0, ValueError, "must be -1 or at least 1"),
    *[("verbose", value, TypeError, WHOLE) for value in (None, "1", np.array([]))],
    ("verbose", -1, ValueError, "must be a whole number of at least 0"),
    ("seed", "one", TypeError, WHOLE),
    *[("seed", value, ValueError, "must be a whole number in [0, 4294967295]") for value in (-1, 0.5, 2**32)],
    *[(name, value, TypeError, NUMBER) for name in ("gamma", "gae_lambda") for value in ("0.9", None, True)],
    *[(name, value, ValueError, UNIT) for name in ("gamma", "gae_lambda") for value in (-0.01, 1.01, NAN, INF)],
    *[("max_grad_norm", value, TypeError, NUMBER) for value in ("0.5", None)],
    *[("max_grad_norm", value, ValueError, POSITIVE) for value in (0, -0.5, NAN, -INF)],
    *[(name, "0.1", TypeError, NUMBER) for name in ("target_kl", "lr_kl_target")],
    *[(name, value, ValueError, POSITIVE) for name in ("target_kl", "lr_kl_target") for value in (0, -1, NAN, INF)],
    *[
        (name, value, TypeError, SCHEDULE_TYPES)
        for name in ("learning_rate", "clip_range", "clip_range_vf", "ent_coef", "vf_coef", "kl_coef")
        for value in ([0.1], True)
    ],
    *[(name, None, TypeError, SCHEDULE_TYPES) for name in ("learning_rate", "ent_coef", "vf_coef", "kl_coef")],
    *[
        (name, value, ValueError, ZERO_ONE_MORE)
        for name in ("learning_rate", "ent_coef", "vf_coef", "kl_coef")
        for value in (-0.1, NAN, INF, "lin_-1", "const_nan")
    ],
    *[
        (name, value, ValueError, "must be positive and finite")
        for name in ("clip_range", "clip_range_vf")
        for value in (0, -0.2, NAN, INF, "lin_0", "exp_-1")
    ],
    *[
        (name, value, ValueError, "must be a schedule")
        for name in ("learning_rate", "clip_range", "clip_range_vf", "ent_coef", "vf_coef", "kl_coef")
        for value in ("0.2", "linear_0.2", "lin_", "lin_1_0")
    ],
    *[("vf_clip", value, ValueError, "must be one of 'max', 'prediction'") for value in ("MAX", None, True)],
    ("vf_clip_units", "advantage_rms", ValueError, "must be one of 'return_std', 'absolute'"),
    ("advantage_scope", "batch", ValueError, "must be one of 'minibatch', 'rollout'"),
    *[("engine", value, ValueError, "must be one of auto, autograd") for value in ("jax", "static", None, "")],
    *[("normalize_advantage", value, TypeError, "must be True or False") for value in (2, 1.0, None, "yes")],
    ("use_sde", -1, TypeError, "must be True or False"),
    *[("policy_kwargs", value, TypeError, "must be a dict") for value in ([1], "net_arch")],
    *[("rollout_buffer_kwargs", value, TypeError, "must be a dict") for value in ([1], np.array([]))],
    ("policy", np.array([]), TypeError, "must be a class derived from SB3's ActorCriticPolicy"),
    ("rollout_buffer_class", np.array([]), TypeError, "must be a class derived from SB3's BaseBuffer"),
    *[("vf_clip", value, ValueError, "must be one of 'max', 'prediction'") for value in (10**400, np.array([]))],
    *[
        ("rollout_buffer_class", value, TypeError, "must be a class derived from SB3's BaseBuffer")
        for value in ("RolloutBuffer", int)
    ],
    ("tensorboard_log", 5, TypeError, "must be the path of a folder"),
    *[("device", value, ValueError, "must be 'auto' or a PyTorch device") for value in ("gpu0", 1.5, -(10**30))],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "rule"), BAD, ids=lambda part: repr(part)[:30])
def test_single_arguments(name: str, value: Any, error: type[Exception], rule: str) -> None:
    with refused(error, f"`{name}` {rule}", f"got {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("name", "kwargs", "taker"),
    [
        ("policy_kwargs", {"net": [8]}, "ActorCriticPolicy (net_arch, "),
        ("policy_kwargs", {"use_sde": True}, "ActorCriticPolicy (net_arch, "),
        ("rollout_buffer_kwargs", {"dist_param": 0}, "TensorRolloutBuffer (dist_param_dim"),
        ("rollout_buffer_kwargs", {"gamma": 0.5}, "TensorRolloutBuffer (dist_param_dim"),
    ],
)
def test_unknown_keys_of_policy_and_buffer(name: str, kwargs: dict[str, Any], taker: str) -> None:
    with refused(TypeError, f"`{name}` must hold arguments of {taker}", f"got {next(iter(kwargs))!r} in it"):
        make(**{name: kwargs})


LEGAL: list[dict[str, Any]] = [
    {"n_steps": 1, "batch_size": 1, "normalize_advantage": False},
    {"n_steps": 2, "batch_size": 2.0, "n_epochs": np.int64(1)},
    {"batch_size": 1, "advantage_scope": "rollout"},
    {"gamma": 0, "gae_lambda": 0},
    {"gamma": 1, "gae_lambda": 1.0},
    {"max_grad_norm": 1e-9},
    {"max_grad_norm": INF},
    {"learning_rate": 0, "ent_coef": 0, "vf_coef": 0, "kl_coef": 0},
    {"learning_rate": "lin_0", "ent_coef": "const_0", "vf_coef": np.float32(0.5), "kl_coef": lambda p: 1 - p},
    {"clip_range": 1e-9, "clip_range_vf": 1e9},
    {"clip_range": None, "clip_range_vf": None},
    {"clip_range": lambda p: 0.0},
    {"target_kl": 1e-9, "sde_sample_freq": -1, "seed": 0, "verbose": 0, "stats_window_size": 1.0},
    {"seed": 2**32 - 1},
    {"learning_rate": 1e-5, "lr_kl_target": 1e-9},
    {"learning_rate": 1e-2, "lr_kl_target": 10},
    {"kl_coef": 1e-6, "adaptive_kl_target": 1e-9},
    {"kl_coef": 1e6, "adaptive_kl_target": 10},
    {"kl_coef": "const_1", "adaptive_kl_target": 0.01},
    {"verbose": np.bool_(False), "normalize_advantage": np.bool_(True), "use_sde": np.int64(0)},
    {"verbose": True, "normalize_advantage": 0, "use_sde": 1},
    {"stats_window_size": None},
    {"device": "auto"},
    {"device": th.device("cpu")},
    {"policy_kwargs": None, "rollout_buffer_kwargs": None, "rollout_buffer_class": None, "tensorboard_log": None},
]


@pytest.mark.filterwarnings("ignore:You are trying to run ClipPPO on the GPU")
@pytest.mark.parametrize("kwargs", LEGAL, ids=lambda kwargs: " ".join(kwargs)[:40])
def test_legal_values_at_the_border_train(kwargs: dict[str, Any]) -> None:
    make(**kwargs).learn(8)


def test_values_that_sb3_converts_are_attributes_of_one_type() -> None:
    model = make(verbose=np.bool_(False), normalize_advantage=1, use_sde=np.bool_(True), stats_window_size=None)
    given = (model.verbose, model.normalize_advantage, model.use_sde)
    assert given == (0, True, True) and [type(value) for value in given] == [int, bool, bool]
    assert model._stats_window_size == sys.maxsize


@pytest.mark.parametrize("changes", [{"n_epochs": 1.0, "batch_size": np.int64(4)}, {"normalize_advantage": 0}])
def test_assigned_values_are_converted(changes: dict[str, Any]) -> None:
    model = make()
    vars(model).update(changes)
    model.learn(8)
    assert {type(getattr(model, name)) for name in changes} == {bool if "normalize_advantage" in changes else int}


@pytest.mark.parametrize("by_callback", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("n_epochs", 0, AT_LEAST_1),
        ("batch_size", None, WHOLE),
        ("target_kl", "0.1", NUMBER),
        ("max_grad_norm", -INF, POSITIVE),
        ("normalize_advantage", 2, "must be True or False"),
    ],
)
def test_assigned_values_are_checked_before_the_next_update(
    name: str, value: Any, rule: str, by_callback: bool
) -> None:
    model = make()
    if not by_callback:
        setattr(model, name, value)
    callback = (lambda *_: setattr(model, name, value) is None) if by_callback else None
    with refused((TypeError, ValueError), f"`{name}` {rule}", f"got {value!r}"):
        model.learn(8, callback=callback)
    assert model._n_updates == 0


class TestCombinations:
    def test_batch_of_one_with_normalisation(self) -> None:
        with refused(
            ValueError,
            "`batch_size` must be greater than 1 to normalise advantages in minibatches, got 1.",
            "advantage_scope='rollout' or normalize_advantage=False",
        ):
            make(batch_size=1)

    def test_rollout_of_one_with_normalisation(self) -> None:
        for scope in ("minibatch", "rollout"):
            with refused(
                ValueError,
                "`n_steps` must be such that n_steps * n_envs is greater than 1",
                "got n_steps=1 and n_envs=1",
                "normalize_advantage=False",
            ):
                make(n_steps=1, advantage_scope=scope)

    @pytest.mark.parametrize("learning_rate", ["lin_3e-4", "cos_3e-4", lambda p: 3e-4])
    def test_learning_rate_schedule_with_its_controller(self, learning_rate: Any) -> None:
        with refused(
            ValueError,
            "`learning_rate` must be a number if `lr_kl_target` is set, got",
            "The rate either follows a schedule or adapts: remove one of the two.",
        ):
            make(learning_rate=learning_rate, lr_kl_target=0.01)

    @pytest.mark.parametrize("learning_rate", [0, 9e-6, 0.011, "const_1"])
    def test_learning_rate_outside_its_controllers_bounds(self, learning_rate: Any) -> None:
        with refused(
            ValueError,
            "`learning_rate` must be in [1e-05, 0.01] if `lr_kl_target` is set",
            f"got {learning_rate!r}",
            "SB3's default is 3e-4.",
        ):
            make(learning_rate=learning_rate, lr_kl_target=0.01)

    @pytest.mark.parametrize("kl_coef", [0, 0.0, "const_0"])
    def test_adaptive_penalty_that_starts_at_zero(self, kl_coef: Any) -> None:
        with refused(
            ValueError,
            f"`kl_coef` must be positive if `adaptive_kl_target` is set, got {kl_coef!r}",
            "Start at 1.0, as the paper does.",
        ):
            make(kl_coef=kl_coef, adaptive_kl_target=0.01)

    @pytest.mark.parametrize("kl_coef", [9e-7, 1.1e6])
    def test_adaptive_penalty_that_starts_outside_its_bounds(self, kl_coef: float) -> None:
        with refused(
            ValueError,
            f"`kl_coef` must be in [1e-06, 1e+06] if `adaptive_kl_target` is set, got {kl_coef!r}",
            "Start at 1.0, as the paper does.",
        ):
            make(kl_coef=kl_coef, adaptive_kl_target=0.01)

    @pytest.mark.parametrize("kl_coef", ["lin_1", lambda p: 1.0])
    def test_adaptive_penalty_with_a_schedule(self, kl_coef: Any) -> None:
        with refused(
            ValueError,
            "`kl_coef` must be a number if `adaptive_kl_target` is set, got",
            "Beta either follows a schedule or adapts: remove one of the two.",
        ):
            make(kl_coef=kl_coef, adaptive_kl_target=0.01)

    @pytest.mark.parametrize(
        ("value", "error"), [(0, ValueError), (-0.01, ValueError), (NAN, ValueError), ("1", TypeError)]
    )
    def test_adaptive_penalty_with_a_bad_target(self, value: Any, error: type[Exception]) -> None:
        with refused(error, "`adaptive_kl_target` must be", f"got {value!r}", "None turns it off."):
            make(kl_coef=1.0, adaptive_kl_target=value)

    @pytest.mark.parametrize(
        "kwargs", [{"kl_coef": 0.5}, {"kl_coef": 1.0, "adaptive_kl_target": 0.01}, {"lr_kl_target": 0.01}]
    )
    @pytest.mark.parametrize(
        "buffer", [{"rollout_buffer_class": RolloutBuffer}, {"rollout_buffer_kwargs": {"dist_param_dim": 0}}]
    )
    def test_buffer_without_the_old_distribution(self, kwargs: dict[str, Any], buffer: dict[str, Any]) -> None:
        name, value = next(iter(kwargs.items()))
        buffer_class = buffer.get("rollout_buffer_class", TensorRolloutBuffer)
        with refused(
            ValueError,
            f"`{name}` needs the exact KL, but `rollout_buffer_class` {buffer_class.__name__} does not store the old",
            f"got {name}={value}",
            "Derive the buffer class from TensorRolloutBuffer",
        ):
            make(**kwargs, **buffer)

    def test_sb3s_dict_buffer_with_the_penalty(self) -> None:
        with refused(ValueError, "`kl_coef` needs the exact KL", "DictRolloutBuffer", "got kl_coef=1.0"):
            env = Still(spaces.Dict({"a": BOX}))
            make(env, "MultiInputPolicy", kl_coef=1.0, rollout_buffer_class=DictRolloutBuffer)

    def test_distribution_whose_kl_is_not_known(self) -> None:
        class Cauchy(DiagGaussianDistribution.__base__):  # type: ignore[misc, name-defined]
            """Stand-in for a distribution of another package."""

            proba_distribution_net = proba_distribution = log_prob = entropy = sample = mode = None
            actions_from_params = log_prob_from_params = None

        class Foreign(ActorCriticPolicy):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.action_dist = Cauchy()

        assert make(policy=Foreign).rollout_buffer.dist_param_dim == 0
        with refused(
            ValueError,
            "`kl_coef` needs the exact KL, but that of the policy's action distribution (Cauchy) is not known",
            "got kl_coef=1.0",
            "Use one of SB3's action distributions.",
        ):
            make(policy=Foreign, kl_coef=1.0)

    def test_gsde_with_discrete_actions(self) -> None:
        with refused(
            ValueError, "`use_sde` must be False unless actions are continuous, got True and Discrete", "Leave"
        ):
            make(Still(action_space=spaces.Discrete(3)), use_sde=True)


class TestPolicies:
    @pytest.mark.parametrize("policy", ["mlp", "LstmPolicy", ""])
    def test_unknown_aliases(self, policy: str) -> None:
        with refused(
            ValueError,
            "`policy` must be one of 'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy', 'Squashed",
            f"got {policy!r}",
        ):
            make(policy=policy)

    @pytest.mark.parametrize("policy", [5, None, int, th.nn.Linear])
    def test_an_object_that_is_not_a_policy(self, policy: Any) -> None:
        with refused(
            TypeError, "`policy` must be a class derived from SB3's ActorCriticPolicy", f"got {policy!r}", "'MlpPolicy'"
        ):
            make(policy=policy)

    @pytest.mark.parametrize("squashed", ["", "Squashed"])
    def test_dict_observations_with_the_wrong_alias(self, squashed: str) -> None:
        for name in ("MlpPolicy", "CnnPolicy"):
            with refused(
                ValueError,
                f"`policy` must accept dict observations, got '{squashed}{name}'. "
                f"You must use `{squashed}MultiInputPolicy`",
            ):
                make(Still(spaces.Dict({"a": BOX})), squashed + name)

    @pytest.mark.parametrize("squashed", ["", "Squashed"])
    def test_plain_observations_with_the_dict_alias(self, squashed: str) -> None:
        with refused(
            ValueError,
            f"`policy` must accept observations that are not dicts, got '{squashed}MultiInputPolicy' and Box",
            f"Use '{squashed}MlpPolicy'",
        ):
            make(policy=f"{squashed}MultiInputPolicy")

    def test_squashed_policy_with_discrete_actions(self) -> None:
        with refused(
            TypeError, "`action_space` must be a Box for a squashed policy, got Discrete(3)", 'Use "MlpPolicy".'
        ):
            make(Still(action_space=spaces.Discrete(3)), "SquashedMlpPolicy")

    @pytest.mark.parametrize("policy", ["MlpPolicy", "SquashedMlpPolicy"])
    def test_infinite_bounds(self, policy: str) -> None:
        below = spaces.Box(np.array([-1, -np.inf], np.float32), np.array([1, 1], np.float32))
        above = spaces.Box(np.array([-1, -1], np.float32), np.array([1, np.inf], np.float32))
        for space in (INFINITE_BOX, below, above):
            with refused(
                ValueError,
                "`env` must have an action space with finite bounds, got Box",
                "gymnasium.wrappers.RescaleAction",
            ):
                make(Still(action_space=space), policy)

    def test_infinite_bounds_of_observations_are_accepted(self) -> None:
        make(Still(INFINITE_BOX))


class TestEnvironments:
    @pytest.mark.parametrize("env", [5, BOX, [Still()]])
    def test_an_object_that_is_not_an_environment(self, env: Any) -> None:
        with refused(TypeError, "`env` must be a gymnasium environment or an SB3 VecEnv, got", "gymnasium.make("):
            make(env)

    def test_none(self) -> None:
        with refused(
            TypeError, "`env` must be a gymnasium environment", "got None of type NoneType", "gymnasium.make("
        ):
            ClipPPO("MlpPolicy", None)

    def test_unknown_ids_raise_gymnasiums_error(self) -> None:
        with pytest.raises(gym.error.NameNotFound, match="NoSuchEnvironment"):
            make("NoSuchEnvironment-v0")

    @pytest.mark.parametrize(
        "space", [spaces.Tuple([BOX]), spaces.Dict({"a": BOX}), spaces.Text(3), spaces.Sequence(BOX)], ids=str
    )
    def test_action_spaces(self, space: spaces.Space[Any]) -> None:
        with refused(
            ValueError,
            "`env` must have an action space of type Box, Discrete, MultiDiscrete, MultiBinary, got",
            "Wrap the environment to convert it.",
        ):
            make(Still(action_space=space))

    @pytest.mark.parametrize(
        ("space", "kind"),
        [(spaces.MultiBinary([2, 3]), "MultiBinary"), (spaces.MultiDiscrete([[2, 3]]), "MultiDiscrete")],
    )
    def test_action_spaces_of_two_dimensions(self, space: spaces.Space[Any], kind: str) -> None:
        with refused(ValueError, f"`env` must have {kind} actions of one dimension, got {kind}(", "Wrap"):
            make(Still(action_space=space))

    @pytest.mark.parametrize(
        "space",
        [
            spaces.Tuple([BOX]),
            spaces.Text(3),
            spaces.Sequence(BOX),
            spaces.Graph(BOX, None),
            spaces.Dict({"a": spaces.Dict({"b": BOX})}),
            spaces.Dict({"a": BOX, "b": spaces.Text(3)}),
        ],
        ids=str,
    )
    def test_observation_spaces(self, space: spaces.Space[Any]) -> None:
        policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
        # SB3's own tests expect a NotImplementedError
        for error in (ValueError, NotImplementedError):
            with refused(
                error,
                "`env` must have an observation space of type Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of",
                "got",
                "Wrap the environment to convert it",
            ):
                make(Still(space), policy)

    @pytest.mark.parametrize(
        ("space", "rule"),
        [
            (
                spaces.Discrete(3, start=1),
                "must count its discrete observations from 0, got Discrete(3, start=1). Wrap",
            ),
            (spaces.Discrete(3, start=-1), "must count its discrete observations from 0"),
            (spaces.MultiDiscrete([3, 3], start=[0, 2]), "must count its discrete observations from 0"),
            (spaces.MultiDiscrete([[3, 3]]), "must have MultiDiscrete observations of one dimension, got"),
            (spaces.Box(-1, 1, ()), "must have Box observations of at least one dimension for"),
            (spaces.Box(0, 255, (), np.uint8), "must have Box observations of at least one dimension for"),
            (spaces.Box(-1, 1, (0,)), "must have observations of at least one number, got"),
            (spaces.Box(-1, 1, (2, 0)), "must have observations of at least one number, got"),
        ],
        ids=str,
    )
    def test_observations_that_sb3s_policies_cannot_read(self, space: spaces.Space[Any], rule: str) -> None:
        with refused(ValueError, f"`env` {rule}", "gymnasium.wrappers."):
            make(Still(space))
        with refused(ValueError, f"`env` {rule}", "gymnasium.wrappers."):
            make(Still(spaces.Dict({"a": BOX, "b": space})), "MultiInputPolicy")

    def test_observations_without_keys(self) -> None:
        with refused(ValueError, "`env` must have observations of at least one number, got Dict()"):
            make(Still(spaces.Dict({})), "MultiInputPolicy")

    def test_actions_without_numbers(self) -> None:
        with refused(ValueError, "`env` must have actions of at least one number, got Box([], [], (0,), float32)"):
            make(Still(action_space=spaces.Box(-1, 1, (0,))))

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda: gym.wrappers.FlattenObservation(Still(spaces.Discrete(3, start=1))),
            lambda: gym.wrappers.FlattenObservation(Still(spaces.MultiDiscrete([[3, 3]]))),
            lambda: gym.wrappers.ReshapeObservation(Still(spaces.Box(-1, 1, ())), (1,)),
            lambda: Still(spaces.Discrete(1)),
            lambda: Still(spaces.MultiBinary([2, 3])),
            lambda: Still(action_space=spaces.Box(-1, 1, ())),
        ],
    )
    def test_the_suggested_changes_train(self, wrap: Callable[[], gym.Env[Any, Any]]) -> None:
        make(wrap()).learn(8)

    def test_the_users_policies_may_read_what_sb3s_cannot(self) -> None:
        make(Still(spaces.Box(-1, 1, ())), policy_kwargs={"features_extractor_class": Columns}).learn(8)
        make(Still(spaces.Box(-1, 1, ())), OwnColumns).learn(8)
        make(Still(spaces.Discrete(3, start=5)), OwnReading).learn(8)
        with refused(ValueError, "must have Box observations of at least one dimension for NatureCNN"):
            make(Still(spaces.Box(-1, 1, ())), policy_kwargs={"features_extractor_class": NatureCNN})

    @pytest.mark.parametrize("name", ["cartpole", "sync", "wrapped", "atari", "envpool", "envpool of gym"])
    def test_the_error_for_vectorised_environments_names_the_adapter(self, name: str) -> None:
        env = vectorised(name)
        for use in (make, make().set_env, lambda env: ClipPPO.load(io.BytesIO(self.saved()), env=env)):
            with refused(
                TypeError,
                "`env` must be a gymnasium environment or an SB3 VecEnv, got the vectorised environment",
                "Pass sb3_clipvf.envs.as_vec_env(env).",
            ):
                use(env)
        env.close()

    def saved(self) -> bytes:
        file = io.BytesIO()
        make().save(file)
        return file.getvalue()

    def test_environments_of_neither_library_get_sb3s_error(self) -> None:
        class Old:
            observation_space, action_space = BOX, BOX

        for use in (make, make().set_env):
            with pytest.raises(ValueError, match="In this case, we expect OpenAI Gym to be installed"):
                use(Old())

    def test_environments_of_openai_gym_are_converted_as_in_sb3(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Old:
            """Has spaces of another library, with the names of Gymnasium's."""

            observation_space = action_space = type("Discrete", (), {"__repr__": lambda _: "Discrete(2)"})()
            converted = Still(action_space=spaces.Discrete(2))

            def reset(self, seed: int | None = None) -> None:
                """Nothing."""

            @property
            def unwrapped(self) -> "Old":
                return self

        module = types.SimpleNamespace(GymV26CompatibilityV0=lambda env: env.converted)
        monkeypatch.setitem(sys.modules, "shimmy", module)
        monkeypatch.setattr(patch_gym, "gym_installed", True)
        monkeypatch.setattr(patch_gym, "gym", types.SimpleNamespace(Env=Old), raising=False)
        with pytest.warns(UserWarning, match="You provided an OpenAI Gym environment"):
            model = make(Old()).learn(8)
        assert model.action_space == spaces.Discrete(2)
        with pytest.warns(UserWarning, match="You provided an OpenAI Gym environment"):
            model.set_env(Old())
        model.learn(8)
        # Their spaces are checked after that.
        Old.converted = Still(action_space=INFINITE_BOX)
        with (
            pytest.warns(UserWarning, match="OpenAI Gym"),
            refused(ValueError, "`env` must have an action space with finite bounds, got"),
        ):
            make(Old())

    def test_spaces_of_openai_gym_are_named(self) -> None:
        space = type("Discrete", (), {"__repr__": lambda _: "Discrete(2)", "__module__": "gym.spaces.discrete"})()
        with refused(ValueError, "`env` must have an action space", "got Discrete(2) of type gym.spaces.discrete.Disc"):
            make(Still(action_space=space))


class Columns(BaseFeaturesExtractor):
    """Accepts observations without a dimension."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, 1)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return observations.reshape(-1, 1)


class OwnColumns(ActorCriticPolicy):
    """Uses this extractor by default."""

    def __init__(self, *args: Any, features_extractor_class: type[Any] = Columns, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class OwnReading(ActorCriticPolicy):
    """Subtracts the start of the space from observations."""

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return super().extract_features(obs - self.observation_space.start, features_extractor)

    def predict_values(self, obs: Any) -> th.Tensor:
        return super().predict_values(obs - self.observation_space.start)


def vectorised(name: str) -> Any:
    """A vectorised environment of another library."""
    if name == "atari":
        return pytest.importorskip("ale_py.vector_env").AtariVectorEnv("breakout", 2)
    if name.startswith("envpool"):
        envpool = pytest.importorskip("envpool")
        return (envpool.make_gym if "gym" in name else envpool.make_gymnasium)("CartPole-v1", num_envs=2)
    if name == "sync":
        return gym.make_vec("CartPole-v1", 2, "sync")
    env = gym.make_vec("CartPole-v1", 2)
    return gym.wrappers.vector.ClipReward(env, -1, 1) if name == "wrapped" else env


class TestLearn:
    @pytest.mark.parametrize(
        ("value", "error", "rule"),
        [
            ("1000", TypeError, WHOLE),
            (None, TypeError, WHOLE),
            (-1, ValueError, "must be a whole number of at least 0"),
            (0.5, ValueError, "must be a whole number of at least 0"),
            (NAN, ValueError, "must be a whole number of at least 0"),
            (INF, ValueError, "must be a whole number of at least 0"),
        ],
    )
    def test_total_timesteps(self, value: Any, error: type[Exception], rule: str) -> None:
        with refused(error, f"`total_timesteps` {rule}", f"got {value!r}", "Pass the number of environment steps."):
            make().learn(value)

    @pytest.mark.parametrize(
        ("value", "error"), [("1e6", TypeError), (0, ValueError), (-5, ValueError), (1.5, ValueError)]
    )
    def test_schedule_timesteps(self, value: Any, error: type[Exception]) -> None:
        with refused(error, "`schedule_timesteps` must be a whole number", f"got {value!r}", "of all calls together."):
            make().learn(8, schedule_timesteps=value)

    @pytest.mark.parametrize(("value", "error"), [("1", TypeError), (0, ValueError), (-1, ValueError)])
    def test_log_interval(self, value: Any, error: type[Exception]) -> None:
        with refused(error, "`log_interval` must be a whole number", f"got {value!r}", "None turns it off."):
            make().learn(8, log_interval=value)

    @pytest.mark.parametrize("bad", [NAN, INF, -1e-9])
    @pytest.mark.parametrize("name", ["learning_rate", "clip_range", "clip_range_vf", "ent_coef", "vf_coef", "kl_coef"])
    def test_schedules_that_return_illegal_values_later(self, name: str, bad: float) -> None:
        model = make(**{name: lambda p: 0.1 if p > 0.5 else bad})
        model.learn(8, schedule_timesteps=1000)
        with refused(
            ValueError, f"`{name}` must be at least 0 and finite, got {bad} from", "progress_remaining=0.5", "Correct"
        ):
            model.learn(8, schedule_timesteps=16)


@pytest.fixture(scope="module")
def file() -> io.BytesIO:
    """A saved model."""
    file = io.BytesIO()
    make().save(file)
    return file


class TestLoad:
    def load(self, file: io.BytesIO, **kwargs: Any) -> ClipPPO:
        file.seek(0)
        return ClipPPO.load(file, device="cpu", **kwargs)

    @pytest.mark.parametrize(
        ("name", "value", "error", "rule"),
        [
            ("n_steps", -1, ValueError, AT_LEAST_1),
            ("clip_range", "linear_0.1", ValueError, "must be a schedule"),
            ("ent_coef", -1.0, ValueError, ZERO_ONE_MORE),
            ("engine", "jax", ValueError, "must be one of auto, autograd"),
            ("vf_clip", "min", ValueError, "must be one of 'max', 'prediction'"),
            ("batch_size", 1, ValueError, "must be greater than 1 to normalise advantages"),
            ("gamma", "1", TypeError, NUMBER),
        ],
    )
    def test_arguments_are_checked_again(
        self, file: io.BytesIO, name: str, value: Any, error: type[Exception], rule: str
    ) -> None:
        with refused(error, f"`{name}` {rule}", f"got {value!r}"):
            self.load(file, **{name: value})

    def test_a_frequency_of_0_loads_as_minus_1(self) -> None:
        """SB3 saves it, and so did earlier versions."""
        file = io.BytesIO()
        model = make()
        model.sde_sample_freq = 0
        model.save(file)
        assert self.load(file).sde_sample_freq == -1
        assert self.load(file, sde_sample_freq=4).sde_sample_freq == 4
        assert self.load(file, custom_objects={"sde_sample_freq": 4}).sde_sample_freq == 4
        with refused(ValueError, "`sde_sample_freq` must be -1 or at least 1, got 0"):
            self.load(file, sde_sample_freq=0)
        file = io.BytesIO()
        PPO("MlpPolicy", Still(), use_sde=True, sde_sample_freq=0, device="cpu").save(file)
        with pytest.warns(UserWarning, match="not saved by ClipPPO"):
            assert self.load(file).sde_sample_freq == -1

    def test_an_unknown_device(self, file: io.BytesIO) -> None:
        with refused(ValueError, "`device` must be 'auto' or a PyTorch device, got 'gpu'"):
            ClipPPO.load(file, device="gpu")

    def test_contradictions_are_refused_again(self, file: io.BytesIO) -> None:
        with refused(ValueError, "`kl_coef` must be positive if `adaptive_kl_target` is set, got 0.0"):
            self.load(file, adaptive_kl_target=0.01)
        with refused(ValueError, "`learning_rate` must be a number if `lr_kl_target` is set, got 'lin_0.001'"):
            self.load(file, lr_kl_target=0.01, learning_rate="lin_0.001")

    def test_only_the_constructor_accepts_ids(self, file: io.BytesIO) -> None:
        file.seek(0)
        for call in (make().set_env, lambda env: ClipPPO.load(file, env=env)):
            with refused(TypeError, "got 'CartPole-v1' of type str", "only the constructor accepts the id as well."):
                call("CartPole-v1")

    def test_training_needs_an_environment(self, file: io.BytesIO) -> None:
        with refused(ValueError, "`env` must be set before learning, got None. Pass it to `load`, or call `set_env`"):
            self.load(file).learn(8)

    def test_an_object_that_is_not_a_file(self, tmp_path: Any) -> None:
        with pytest.raises(FileNotFoundError, match="missing"):
            ClipPPO.load(tmp_path / "missing")
        with pytest.raises(ValueError, match="wasn't a zip-file"):
            ClipPPO.load(io.BytesIO(b"no zip"))


class TestChecks:
    """The checks themselves, at the limits of legal values."""

    def test_int(self) -> None:
        assert [check_int("n", value, 1, "Do.") for value in (1, 1.0, np.int32(7), 2**63 - 1)] == [1, 1, 7, 2**63 - 1]
        assert check_int("n", 3, 1, "Do.", maximum=3) == 3
        assert type(check_int("n", np.float64(2), 1, "Do.")) is int
        with refused(ValueError, "`n` must be a whole number in [1, 3], got 4. Do it."):
            check_int("n", 4, 1, "Do it.", maximum=3)
        for value in (2**63, 10**400, 1e300):  # too large for arrays and kernels
            with refused(ValueError, f"`n` must be a whole number in [1, {2**63 - 1}], got {value!r}. Do it."):
                check_int("n", value, 1, "Do it.")

    def test_float(self) -> None:
        assert [check_float("x", value, "Do.", 0, 2) for value in (0, 2, np.float32(0.5))] == [0.0, 2.0, 0.5]
        assert type(check_float("x", 1, "Do.")) is float
        for value, kwargs, rule in (
            (0, {"above_low": True}, "must be finite and above 0"),
            (0, {"high": 2.0, "above_low": True}, "must be in (0, 2]"),
            (2.5, {"high": 2.0}, "must be in [0, 2]"),
            (-1, {}, "must be finite and at least 0"),
        ):
            with refused(ValueError, f"`x` {rule}, got {value!r}. Do"):
                check_float("x", value, "Do it.", **kwargs)  # type: ignore[arg-type]

    def test_keywords(self) -> None:
        def takes(env: Any, size: int = 1) -> None: ...
        def takes_all(env: Any, **kwargs: Any) -> None: ...

        check_keywords("k", {"size": 3}, takes, ("env",), "Do.")
        check_keywords("k", {"anything": 3}, takes_all, ("env",), "Do.")
        for key in ("sise", "env", 3):
            with refused(TypeError, f"`k` must hold arguments of takes (size), got {key!r} in it. Do it."):
                check_keywords("k", {"size": 3, key: 4}, takes, ("env",), "Do it.")

    def test_others(self) -> None:
        check_bool("b", False)
        check_choice("c", "a", ("a", "b"), "Do.")
        check_class("k", bool, int, "Do.")
        check_type("t", None, int, "an int", "Do.")
        check_device("cpu")
        with refused(TypeError, "`t` must be an int, got 'x' of type str. Do"):
            check_type("t", "x", int, "an int", "Do it.")
        with refused(TypeError, "`k` must be a class derived from SB3's int, got <class 'str'>. Do"):
            check_class("k", str, int, "Do it.")
