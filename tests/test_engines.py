"""
The contract of the engines: they have the numbers of a straightforward update written here.

A new engine joins by adding its name to `ENGINES`.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from kernel_cases import divide
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch import distributions as td
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_clipvf.distributions import dist_param_dim, dist_params
from sb3_clipvf.engines.autograd import AutogradEngine
from sb3_clipvf.engines.cuda.static_step import StaticEngine
from sb3_clipvf.engines.fused import FusedEngine
from sb3_clipvf.engines.interface import Engine, UpdateCoefficients, UpdateSettings, UpdateStatistics
from sb3_clipvf.engines.selection import ENGINE_NAMES, check_engine_name, select_engine
from sb3_clipvf.policies import SquashedActorCriticPolicy
from sb3_clipvf.rollout import TensorRolloutBuffer

# "static" runs the operations of cuda_graph's updates one by one. tests/test_engines_cuda_graph.py has the graphs.
ENGINES = ["autograd", "fused", "native", "static"]
DIVIDED = "native, divided"
# Policies that an engine refuses: tests/test_engines_support.py has the reasons.
NOT_RUN = {("fused", "squashed"), ("native", "squashed")}

OBS = spaces.Box(-2.0, 2.0, (3,), np.float32)
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
ACTIONS: dict[str, tuple[spaces.Space[Any], type[ActorCriticPolicy], dict[str, Any]]] = {
    "discrete": (spaces.Discrete(3), ActorCriticPolicy, {}),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), ActorCriticPolicy, {}),
    "multi_binary": (spaces.MultiBinary(3), ActorCriticPolicy, {}),
    "box": (BOX, ActorCriticPolicy, {}),
    "separate": (BOX, ActorCriticPolicy, {"net_arch": {"pi": [8, 4], "vf": [6]}, "activation_fn": th.nn.ReLU}),
    "linear": (spaces.Discrete(3), ActorCriticPolicy, {"net_arch": []}),
    "deep": (BOX, ActorCriticPolicy, {"net_arch": [8, 6, 4], "activation_fn": th.nn.SiLU}),
    "elu": (spaces.Discrete(3), ActorCriticPolicy, {"net_arch": {"pi": [], "vf": [5]}, "activation_fn": th.nn.ELU}),
    "leaky_relu": (BOX, ActorCriticPolicy, {"activation_fn": th.nn.LeakyReLU, "ortho_init": False}),
    "log_std_init": (BOX, ActorCriticPolicy, {"log_std_init": -1.0, "share_features_extractor": False}),
    "adamw": (BOX, ActorCriticPolicy, {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"eps": 1e-5}}),
    "adam_options": (
        spaces.Discrete(3),
        ActorCriticPolicy,
        {"optimizer_kwargs": {"eps": 1e-4, "betas": (0.8, 0.95), "weight_decay": 0.1}},
    ),
    "adam_decoupled": (
        BOX,
        ActorCriticPolicy,
        {"optimizer_kwargs": {"weight_decay": 0.5, "decoupled_weight_decay": True}},
    ),
    "gsde": (BOX, ActorCriticPolicy, {"use_sde": True}),
    "gsde_std_per_latent": (BOX, ActorCriticPolicy, {"use_sde": True, "full_std": False, "log_std_init": -0.5}),
    "gsde_relu": (
        BOX,
        ActorCriticPolicy,
        {"use_sde": True, "net_arch": {"pi": [8, 4], "vf": []}, "activation_fn": th.nn.ReLU, "ortho_init": False},
    ),
    "gsde_linear": (spaces.Box(-1.0, 1.0, (1,), np.float32), ActorCriticPolicy, {"use_sde": True, "net_arch": []}),
    # Log standard deviations near 0, where `expln` has its two branches.
    "gsde_expln": (BOX, ActorCriticPolicy, {"use_sde": True, "use_expln": True, "log_std_init": 0.0}),
    "squashed": (BOX, SquashedActorCriticPolicy, {}),
}
SETTINGS = UpdateSettings(
    batch_size=8,
    n_epochs=2,
    normalize_advantage=True,
    advantage_scope="minibatch",
    vf_clip="max",
    max_grad_norm=0.5,
    target_kl=None,
    measure_kl_after=True,
    has_dist_params=True,
    discrete_actions=False,
)
# Ranges that some transitions leave and others do not: see the test of the clip fractions.
COEFFICIENTS = UpdateCoefficients(clip_range=0.1, clip_range_vf=0.2, ent_coef=0.01, vf_coef=0.5, kl_coef=2.0)
N_STEPS, N_ENVS = 6, 5
N_TRANSITIONS = N_STEPS * N_ENVS


def make_policy(name: str, learning_rate: float = 3e-3) -> ActorCriticPolicy:
    action_space, policy_class, kwargs = ACTIONS[name]
    th.manual_seed(1)
    return policy_class(OBS, action_space, lambda _: learning_rate, **{"net_arch": [8], **kwargs})


def collect(policy: ActorCriticPolicy, buffer: Any, moved: float) -> Any:
    """Collect a rollout of random observations; then change the policy a little, so that ratios are not 1."""
    rng = np.random.default_rng(0)
    buffer.reset()
    for _ in range(N_STEPS):
        obs = rng.normal(size=(N_ENVS, 3)).astype(np.float32)
        with th.no_grad():
            actions, values, log_prob = policy(th.as_tensor(obs))
            row = {"dist_params": dist_params(policy.action_dist)} if isinstance(buffer, TensorRolloutBuffer) else {}
        rewards, starts = rng.normal(size=N_ENVS), rng.random(N_ENVS) < 0.2
        buffer.add(obs, actions.numpy().reshape(N_ENVS, -1), rewards, starts, values, log_prob, **row)
    buffer.compute_returns_and_advantage(th.zeros(N_ENVS), np.zeros(N_ENVS, bool))
    with th.no_grad():
        for parameter in policy.parameters():
            parameter += moved * th.randn(parameter.shape)
    return buffer


def make_case(name: str, moved: float = 0.1, **kwargs: Any) -> tuple[ActorCriticPolicy, TensorRolloutBuffer]:
    policy = make_policy(name, **kwargs)
    buffer = TensorRolloutBuffer(
        N_STEPS, OBS, ACTIONS[name][0], "cpu", n_envs=N_ENVS, dist_param_dim=dist_param_dim(policy.action_dist) or 0
    )
    return policy, collect(policy, buffer, moved)


def make_engine(name: str, policy: ActorCriticPolicy, settings: UpdateSettings, buffer: Any) -> Engine:
    if name == "static":
        return StaticEngine(policy, settings)
    return select_engine(name, policy, settings, buffer)[0]


def settings_for(name: str, **changes: Any) -> UpdateSettings:
    discrete = isinstance(ACTIONS[name][0], spaces.Discrete)
    return dataclasses.replace(SETTINGS, discrete_actions=discrete, **changes)


# ------------------------------------------------------------------ a straightforward update


def old_distributions(policy: ActorCriticPolicy, row: th.Tensor) -> list[td.Distribution]:
    """Return pi_old as torch's own distributions, one for each part whose KL torch computes."""
    space = policy.action_space
    if isinstance(space, spaces.Discrete):
        return [td.Categorical(logits=row)]
    if isinstance(space, spaces.MultiDiscrete):
        return [td.Categorical(logits=part) for part in row.split(space.nvec.tolist(), dim=1)]
    if isinstance(space, spaces.MultiBinary):
        return [td.Independent(td.Bernoulli(logits=row), 1)]
    mean, log_std = row.chunk(2, dim=1)
    return [td.Independent(td.Normal(mean, log_std.exp()), 1)]


def new_distributions(dist: Distribution) -> list[td.Distribution]:
    inner = dist.distribution
    parts = inner if isinstance(inner, list) else [inner]
    return [part if isinstance(part, td.Categorical) else td.Independent(part, 1) for part in parts]


def exact_kl(policy: ActorCriticPolicy, batch: Any) -> th.Tensor:
    dist = policy.get_distribution(batch.observations)
    pairs = zip(old_distributions(policy, batch.old_dist_params), new_distributions(dist), strict=True)
    return th.stack([td.kl_divergence(old, new) for old, new in pairs]).sum(dim=0).mean()


def slow_update(
    policy: ActorCriticPolicy, buffer: Any, settings: UpdateSettings, coefficients: UpdateCoefficients
) -> dict[str, Any]:
    """Run PPO's update with each choice written as a condition on transitions; return statistics as lists."""
    seen: dict[str, Any] = defaultdict(list)
    all_advantages = th.as_tensor(buffer.advantages)
    for epoch in range(settings.n_epochs):
        seen["approx_kl"], seen["kl"], seen["n_epochs"] = [], [], epoch + 1
        for batch in buffer.get(settings.batch_size):
            actions = batch.actions.long().flatten() if settings.discrete_actions else batch.actions
            dist = policy.get_distribution(batch.observations)
            log_prob, values = dist.log_prob(actions), policy.predict_values(batch.observations).flatten()
            entropy = dist.entropy()
            ratio = th.exp(log_prob - batch.old_log_prob)

            advantages = batch.advantages
            if settings.normalize_advantage and settings.advantage_scope == "rollout":
                advantages = (advantages - all_advantages.mean()) / (all_advantages.std() + 1e-8)
            elif settings.normalize_advantage and len(advantages) > 1:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

            used_ratio = ratio
            if coefficients.clip_range is not None:
                # A good action gains nothing above 1 + eps, a bad one nothing below 1 - eps
                limit = 1 + coefficients.clip_range * advantages.sign()
                past = th.where(advantages > 0, ratio > limit, ratio < limit)
                used_ratio = th.where(past, limit, ratio)
                outside = (ratio > 1 + coefficients.clip_range) | (ratio < 1 - coefficients.clip_range)
                seen["clip_fraction"].append(outside.float().mean().item())
            policy_loss = -(used_ratio * advantages).sum() / len(ratio)

            errors = (values - batch.returns) ** 2
            if coefficients.clip_range_vf is not None:
                change = values - batch.old_values
                too_far = change.abs() > coefficients.clip_range_vf
                held = th.where(too_far, batch.old_values + coefficients.clip_range_vf * change.sign(), values)
                held_errors = (held - batch.returns) ** 2
                replaced = too_far if settings.vf_clip == "prediction" else too_far & (held_errors > errors)
                errors = th.where(replaced, held_errors, errors)
                seen["vf_clip_fraction"].append(too_far.float().mean().item())
            value_loss = errors.sum() / len(errors)

            kl = exact_kl(policy, batch)
            loss = policy_loss + coefficients.vf_coef * value_loss - coefficients.ent_coef * entropy.mean()
            loss = loss + coefficients.kl_coef * kl
            k3 = (ratio - 1 - ratio.log()).mean().item()
            seen["policy_gradient_loss"].append(policy_loss.item())
            seen["value_loss"].append(value_loss.item())
            seen["entropy_loss"].append(-entropy.mean().item())
            seen["ratio_max"].append(ratio.max().item())
            seen["approx_kl"].append(k3)
            seen["kl"].append(kl.item())
            seen["loss"] = [loss.item()]
            if settings.target_kl is not None and k3 > 1.5 * settings.target_kl:
                seen["stopped_at_kl"] = k3
                return seen

            parameters = list(policy.parameters())
            gradients = th.autograd.grad(loss, parameters, allow_unused=True)
            norm = th.cat([g.flatten() for g in gradients if g is not None]).norm().item()
            seen["grad_norm"].append(norm)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                # torch.nn.utils.clip_grad_norm_ adds 1e-6
                scale = min(1.0, settings.max_grad_norm / (norm + 1e-6))
                parameter.grad = None if gradient is None else gradient * scale
            policy.optimizer.step()
    return seen


def compare(
    engine_name: str,
    name: str,
    settings: UpdateSettings,
    coefficients: UpdateCoefficients,
    n_updates: int = 1,
    **kwargs: Any,
) -> tuple[UpdateStatistics, dict[str, Any]]:
    """Compare updates by an engine and by the slow program, from the same permutations and parameters."""
    if (engine_name, name) in NOT_RUN:
        pytest.skip(f"the {engine_name} engine refuses {name} policies")
    policy, buffer = make_case(name, **kwargs)
    engine = make_engine(engine_name, policy, settings, buffer)
    for _ in range(n_updates):
        np.random.seed(7)
        th.manual_seed(7)
        statistics = engine.update(buffer, coefficients)
    # Tests replace what "custom" means, so its updates are not kept.
    run_slowly = slow_updates.__wrapped__ if name == "custom" else slow_updates
    slow_policy, slow_buffer, seen = run_slowly(name, settings, coefficients, n_updates, **kwargs)
    assert_same_training(policy, slow_policy)
    assert_same_statistics(statistics, seen, slow_policy, slow_buffer, settings)
    return statistics, seen


@functools.cache
def slow_updates(
    name: str, settings: UpdateSettings, coefficients: UpdateCoefficients, n_updates: int, **kwargs: Any
) -> tuple[ActorCriticPolicy, TensorRolloutBuffer, dict[str, Any]]:
    """Run updates by the slow program, once for all engines, and return what they leave."""
    policy, buffer = make_case(name, **kwargs)
    for _ in range(n_updates):
        np.random.seed(7)
        th.manual_seed(7)
        seen = slow_update(policy, buffer, settings, coefficients)
    return policy, buffer, seen


def assert_same_training(policy: ActorCriticPolicy, slow_policy: ActorCriticPolicy) -> None:
    for (name, parameter), slow in zip(policy.named_parameters(), slow_policy.parameters(), strict=True):
        # Gradients differ by float32 rounding, about 1e-7 of their size. Adam divides by their root mean square, so a
        # step of 3e-3 differs by as little, or by 3e-3 * 1e-8 / 1e-5 where the gradient is nearly zero (its epsilon).
        th.testing.assert_close(parameter, slow, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        state, slow_state = policy.optimizer.state[parameter], slow_policy.optimizer.state[slow]
        assert not slow_state or state.keys() == slow_state.keys()
        for key, tensor in state.items():
            # Before the first step torch has no state, and an engine may have one of zeros.
            th.testing.assert_close(tensor, slow_state.get(key, th.zeros_like(tensor)), rtol=1e-3, atol=1e-6)


def assert_same_statistics(
    statistics: UpdateStatistics, seen: dict[str, Any], slow_policy: ActorCriticPolicy, buffer: Any, settings: Any
) -> None:
    numbers = statistics.read()
    expected = {
        key: np.mean(values)
        for key, values in seen.items()
        if key not in ("n_epochs", "stopped_at_kl", "ratio_max") and values
    }
    expected["ratio_max"] = max(seen["ratio_max"])
    if settings.measure_kl_after:
        with th.no_grad():
            expected["kl_after_update"] = exact_kl(slow_policy, next(buffer.in_order(N_TRANSITIONS)))
    assert numbers.keys() == expected.keys()
    for key, value in expected.items():
        # Float32 sums in another order, of policies that agree to the tolerance above
        assert numbers[key] == pytest.approx(float(value), rel=1e-3, abs=2e-5), key
    assert statistics.n_epochs == seen["n_epochs"]
    assert (statistics.stopped_at_kl is None) == ("stopped_at_kl" not in seen)
    if statistics.stopped_at_kl is not None:
        assert statistics.stopped_at_kl == pytest.approx(seen["stopped_at_kl"], rel=1e-3)


OBJECTIVES = {
    "clip": {"kl_coef": 0.0},
    "kl": {"clip_range": None},
    "both": {},
    "neither": {"clip_range": None, "kl_coef": 0.0},
}
VALUE_LOSSES = {
    "plain": ({"clip_range_vf": None}, "max"),
    "max": ({}, "max"),
    "prediction": ({}, "prediction"),
}


@pytest.fixture
def engine_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an engine; DIVIDED is native with several groups of rows, and blocks, on three threads."""
    if request.param == DIVIDED:
        divide(monkeypatch, n_threads=3)
        return "native"
    return str(request.param)


@pytest.mark.parametrize("engine_name", [*ENGINES, DIVIDED], indirect=True)
class TestContract:
    @pytest.mark.parametrize("value", VALUE_LOSSES)
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_objectives_and_value_losses(self, engine_name: str, objective: str, value: str) -> None:
        changes, vf_clip = VALUE_LOSSES[value]
        coefficients = dataclasses.replace(COEFFICIENTS, **OBJECTIVES[objective], **changes)
        compare(engine_name, "box", settings_for("box", vf_clip=vf_clip), coefficients, n_updates=2)

    # Surrogate losses see log-probabilities only, whatever the distribution. The KL's gradient depends on it.
    @pytest.mark.parametrize("objective", ["clip", "kl"])
    @pytest.mark.parametrize("actions", [name for name in ACTIONS if name != "box"])
    def test_action_spaces(self, engine_name: str, actions: str, objective: str) -> None:
        coefficients = dataclasses.replace(COEFFICIENTS, **OBJECTIVES[objective])
        compare(engine_name, actions, settings_for(actions), coefficients)

    @pytest.mark.parametrize(
        "changes",
        [
            {"normalize_advantage": False},
            {"advantage_scope": "rollout"},
            {"normalize_advantage": False, "advantage_scope": "rollout"},
            {"max_grad_norm": 1e9},
            {"max_grad_norm": math.inf},
            {"max_grad_norm": 1e-3},
            {"batch_size": N_TRANSITIONS},
            {"batch_size": 1000},
            {"batch_size": 1, "advantage_scope": "rollout", "n_epochs": 1},
            {"n_epochs": 1},
            {"measure_kl_after": False},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("actions", ["discrete", "box", "gsde"])
    def test_settings(self, engine_name: str, actions: str, changes: dict[str, Any]) -> None:
        compare(engine_name, actions, settings_for(actions, **changes), COEFFICIENTS)

    @pytest.mark.parametrize("actions", ["discrete", "box"])
    def test_a_range_of_zero_lets_the_first_step_through(self, engine_name: str, actions: str) -> None:
        """Where an annealed range ends: ratios are still 1, though log-probabilities may differ by rounding."""
        coefficients = dataclasses.replace(COEFFICIENTS, clip_range=0.0, kl_coef=0.0, ent_coef=0.0)
        settings = settings_for(actions, n_epochs=1, batch_size=N_TRANSITIONS)
        statistics, _ = compare(engine_name, actions, settings, coefficients, moved=0.0)
        assert statistics.read()["clip_fraction"] == 0

    def test_other_weights(self, engine_name: str) -> None:
        coefficients = dataclasses.replace(COEFFICIENTS, ent_coef=0.3, vf_coef=0.0, kl_coef=0.1)
        compare(engine_name, "box", settings_for("box"), coefficients)

    @pytest.mark.parametrize("actions", ["box", "gsde"])
    def test_many_updates(self, engine_name: str, actions: str) -> None:
        compare(engine_name, actions, settings_for(actions, n_epochs=4), COEFFICIENTS, n_updates=6, learning_rate=1e-3)

    def test_the_ranges_above_cut_some_and_not_all(self, engine_name: str) -> None:
        """Otherwise the cases above would test no clipping."""
        numbers = compare(engine_name, "box", settings_for("box"), COEFFICIENTS)[0].read()
        assert 0.1 < numbers["clip_fraction"] < 0.9
        assert 0.1 < numbers["vf_clip_fraction"] < 0.9
        assert numbers["kl"] > 1e-3

    @pytest.mark.parametrize("actions", ["discrete", "box"])
    def test_a_last_minibatch_of_one_is_not_normalised(self, engine_name: str, actions: str) -> None:
        settings = settings_for(actions, batch_size=N_TRANSITIONS - 1)
        statistics, _ = compare(engine_name, actions, settings, COEFFICIENTS)
        assert all(np.isfinite(list(statistics.read().values())))

    @pytest.mark.parametrize(
        ("target_kl", "n_steps", "case"),
        [
            # k3 of the minibatches: 0.08, 0.10, ... of a policy that has moved already, then 0, 0.001, 0.001, 0.001,
            # 0.002, 0.003, 0.007, 0.003 of one that only the steps move. The update ends above 1.5 times the target.
            (1e-6, 0, {}),
            (0.06, 1, {}),
            (0.0027, 6, {"moved": 0.0, "learning_rate": 0.01}),
            (1e6, 8, {}),
        ],
    )
    def test_target_kl_stops_before_the_step(
        self, engine_name: str, target_kl: float, n_steps: int, case: dict[str, Any]
    ) -> None:
        settings = settings_for("box", target_kl=target_kl)
        coefficients = dataclasses.replace(COEFFICIENTS, kl_coef=0.0)
        statistics, seen = compare(engine_name, "box", settings, coefficients, **case)
        assert len(seen["grad_norm"]) == n_steps
        # Epochs begun, of 4 minibatches each
        assert statistics.n_epochs == min(n_steps // 4 + 1, 2)
        assert (statistics.stopped_at_kl is None) == (target_kl == 1e6)
        assert ("grad_norm" in statistics.read()) == (n_steps > 0)

    def test_gradient_norm_is_measured_before_clipping(self, engine_name: str) -> None:
        norms = []
        for max_grad_norm in (1e-3, 1e9):
            policy, buffer = make_case("box")
            settings = settings_for("box", max_grad_norm=max_grad_norm, n_epochs=1, batch_size=N_TRANSITIONS)
            np.random.seed(0)
            norms.append(
                make_engine(engine_name, policy, settings, buffer).update(buffer, COEFFICIENTS).read()["grad_norm"]
            )
        assert norms[0] == norms[1] > 0.1

    def test_state_lives_in_the_policy_and_its_optimizer(self, engine_name: str) -> None:
        policy, buffer = make_case("box")
        before = {name: (id(p), p.detach().clone()) for name, p in policy.named_parameters()}
        make_engine(engine_name, policy, settings_for("box"), buffer).update(buffer, COEFFICIENTS)
        for name, parameter in policy.named_parameters():
            identity, old = before[name]
            assert id(parameter) == identity
            assert not th.equal(parameter, old)
            # 2 epochs of 4 minibatches
            assert policy.optimizer.state[parameter]["step"].item() == 8

    def test_the_optimizers_learning_rate_counts(self, engine_name: str) -> None:
        """SB3 sets it before each update."""
        policy, buffer = make_case("box")
        engine = make_engine(engine_name, policy, settings_for("box"), buffer)
        engine.update(buffer, COEFFICIENTS)
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        for group in policy.optimizer.param_groups:
            group["lr"] = 0.0
        engine.update(buffer, COEFFICIENTS)
        assert all(th.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())

    @pytest.mark.parametrize("advantage_scope", ["minibatch", "rollout"])
    @pytest.mark.parametrize("actions", ["discrete", "multi_binary", "box", "gsde", "squashed"])
    def test_the_loop_reads_nothing_from_the_device(self, engine_name: str, actions: str, advantage_scope: str) -> None:
        n_reads = count_reads(engine_name, actions, advantage_scope=advantage_scope)
        # After the last step: whether all was finite; static reads the log of all minibatches, and the number of steps.
        assert sum(n_reads.values()) == {"autograd": 1, "static": 2}[engine_name]

    def test_target_kl_reads_one_number_a_minibatch_or_the_log_of_an_epoch(self, engine_name: str) -> None:
        n_reads = sum(count_reads(engine_name, "box", target_kl=1e6).values())
        assert n_reads == {"autograd": 9, "static": 3}[engine_name]

    def test_torchs_validation_is_restored(self, engine_name: str) -> None:
        policy, buffer = make_case("box")
        make_engine(engine_name, policy, settings_for("box"), buffer).update(buffer, COEFFICIENTS)
        with pytest.raises(ValueError, match="to satisfy the constraint"):
            td.Normal(th.tensor(float("nan")), th.tensor(1.0))


class Reads(TorchDispatchMode):
    """Counts operations that copy a number to the host: item(), float(), bool(), indexing by a mask."""

    def __init__(self, optimizer: th.optim.Optimizer) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.counts: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            th.ops.aten._local_scalar_dense,
            th.ops.aten.nonzero,
            th.ops.aten.masked_select,
            th.ops.aten.equal,
        ):
            # Adam keeps its step counter on the CPU
            if not any(args[0] is state["step"] for state in self.optimizer.state.values()):
                self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def count_reads(engine_name: str, actions: str, **changes: Any) -> dict[str, int]:
    if engine_name not in ("autograd", "static"):
        pytest.skip(f"the {engine_name} engine runs on the host only, and not in modes of torch")
    policy, buffer = make_case(actions)
    settings = settings_for(actions, measure_kl_after=False, **changes)
    engine = make_engine(engine_name, policy, settings, buffer)
    engine.update(buffer, COEFFICIENTS)
    with pytest.MonkeyPatch.context() as patch, Reads(policy.optimizer) as reads:
        # As on a GPU
        patch.setattr(AutogradEngine, "_reads_are_cheap", lambda _: False)
        for name in ("cpu", "numpy", "tolist", "__array__"):
            # These are no operations on a CPU tensor, but reads on any other device
            patch.setattr(th.Tensor, name, counting(getattr(th.Tensor, name), reads.counts))
        engine.update(buffer, COEFFICIENTS)
    return dict(reads.counts)


def counting(method: Callable[..., Any], counts: dict[str, int]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[method.__name__] += 1
        return method(*args, **kwargs)

    return counted


# ------------------------------------------------------------------ the autograd engine alone: any policy, any buffer


class OwnHeads(ActorCriticPolicy):
    """A custom policy that makes a distribution of its own, and leaves `action_dist` alone."""

    def _own(self, obs: th.Tensor) -> tuple[Distribution, th.Tensor]:
        latent_pi, latent_vf = self.mlp_extractor(self.extract_features(obs))
        dist = type(self.action_dist)(self.action_space.shape[0])
        return dist.proba_distribution(self.action_net(latent_pi), self.log_std), self.value_net(latent_vf)

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        dist, values = self._own(obs)
        actions = dist.get_actions(deterministic=deterministic)
        return actions, values, dist.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        dist, values = self._own(obs)
        return values, dist.log_prob(actions), dist.entropy()


def test_a_policy_with_its_own_distribution_gets_the_exact_kl() -> None:
    policy, buffer = make_case("box")
    own = OwnHeads(OBS, BOX, lambda _: 3e-3, net_arch=[8])
    own.load_state_dict(policy.state_dict())
    # What an earlier call for other states left behind
    own.get_distribution(th.rand(3, 3))
    results = []
    for model in (policy, own):
        np.random.seed(0)
        results.append(
            select_engine("autograd", model, settings_for("box"), buffer)[0].update(buffer, COEFFICIENTS).read()
        )
    # The KL's gradient comes through a second forward pass: sums of gradients in another order, see above
    assert results[0] == pytest.approx(results[1], rel=1e-3, abs=2e-5)
    assert_same_training(policy, own)


def test_sb3s_buffer_works_with_the_autograd_engine() -> None:
    coefficients = dataclasses.replace(COEFFICIENTS, kl_coef=0.0)
    settings = settings_for("box", has_dist_params=False, measure_kl_after=False)
    weights = []
    for with_host in (True, False):
        policy, buffer = make_case("box")
        if with_host:
            policy = make_policy("box")
            buffer = collect(policy, RolloutBuffer(N_STEPS, OBS, BOX, "cpu", gae_lambda=1.0, n_envs=N_ENVS), moved=0.1)
        np.random.seed(0)
        numbers = select_engine("autograd", policy, settings, buffer)[0].update(buffer, coefficients).read()
        assert "kl" not in numbers
        weights.append(policy.state_dict())
    for name, tensor in weights[0].items():
        assert th.equal(tensor, weights[1][name]), name


@pytest.fixture
def small_evaluation_batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sb3_clipvf.engines.autograd.EVALUATION_BATCH", 7)
    yield


def test_kl_after_weighs_every_transition_the_same(small_evaluation_batch: None) -> None:
    """30 transitions in forward passes of 7 leave a last one of 2."""
    compare("autograd", "box", settings_for("box"), COEFFICIENTS)


# ------------------------------------------------------------------ choosing an engine


def test_the_contract_covers_all_engines() -> None:
    # bfloat16 has no numbers of a straightforward update; tests/test_engines_cuda_graph.py bounds its differences.
    names = {"static" if name == "cuda_graph" else name for name in ENGINE_NAMES}
    assert {"auto", "cuda_graph_bf16", *ENGINES} == names


@pytest.mark.parametrize("name", ["auto", "autograd", "fused", "native"])
def test_select_gives_the_engine_and_the_reason(name: str) -> None:
    policy, buffer = make_case("box")
    engine, reason = select_engine(name, policy, SETTINGS, buffer)
    assert engine.policy is policy
    assert engine.settings is SETTINGS
    if name == "auto":
        assert (engine.name, reason) == ("native", "it is the fastest for this policy")
    else:
        assert (engine.name, reason) == (name, "as requested")


def test_auto_logs_why_a_policy_is_not_run_faster() -> None:
    policy, buffer = make_case("squashed")
    engine, reason = select_engine("auto", policy, SETTINGS, buffer)
    assert engine.name == "autograd"
    assert reason == (
        "native cannot run the policy (its class is SquashedActorCriticPolicy, and only MlpPolicy itself is compiled), "
        "and neither can fused (its class overrides _get_action_dist_from_latent())"
    )


@pytest.mark.parametrize(
    ("name", "reason"), [("native", "its class is Squashed"), ("fused", "its class overrides _get_action_dist")]
)
def test_an_engine_that_cannot_run_the_policy_is_refused(name: str, reason: str) -> None:
    policy, buffer = make_case("squashed")
    refusal = f"`engine` must be one that can run the policy, got '{name}', which cannot: {reason}.*Use 'auto'"
    with pytest.raises(ValueError, match=refusal):
        select_engine(name, policy, SETTINGS, buffer)


@pytest.mark.parametrize("name", ["jax", "static", "", "AUTO", None, 1])
def test_unknown_engines_are_refused(name: Any) -> None:
    with pytest.raises(
        ValueError, match="`engine` must be one of auto, autograd, fused, native, cuda_graph, cuda_graph_bf16, got"
    ):
        check_engine_name(name)
    with pytest.raises(ValueError, match=r"'auto' is the default\."):
        select_engine(name, make_policy("box"), SETTINGS, None)


# ------------------------------------------------------------------ the fused engine alone


class Doubled(FlattenExtractor):
    """A custom features extractor with a parameter of its own."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space)
        self.scale = th.nn.Parameter(th.full((3,), 2.0))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) * self.scale


class Switching(Doubled):
    """An extractor whose second parameter only some minibatches use."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space)
        self.other_scale = th.nn.Parameter(th.ones(3))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        return features * self.other_scale if observations[0, 0] > 0 else features


class Gated(Switching):
    """An extractor whose second parameter is used once ``is_open``."""

    is_open = False

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = Doubled.forward(self, observations)
        return features * self.other_scale if self.is_open else features


class Bounded(Doubled):
    """An extractor that bounds its parameter by a new tensor in each forward pass."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.scale.data = self.scale.data.clamp(max=2.001)
        return super().forward(observations)


def sliced(layer: th.nn.Linear, x: th.Tensor) -> th.Tensor:
    return th.nn.functional.linear(x, layer.weight, layer.bias).repeat(1, 2)[:, : layer.out_features]


def turned(layer: th.nn.Linear, x: th.Tensor) -> th.Tensor:
    return (layer.weight @ x.T + layer.bias[:, None]).T


LAYOUTS = {"sliced": sliced, "turned": turned}


class ForeignBuffer(TensorRolloutBuffer):
    """A buffer whose minibatches are SB3's, without the old distribution."""

    def get(self, batch_size: int | None = None) -> Any:
        for batch in super().get(batch_size):
            yield RolloutBufferSamples(*batch[:6])


class OwnEntropy(ActorCriticPolicy):
    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        values, log_prob, _ = super().evaluate_actions(obs, actions)
        return values, log_prob, -log_prob


class TestFused:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"features_extractor_class": Doubled},
            {"features_extractor_class": Doubled, "share_features_extractor": False},
            {"features_extractor_class": Doubled, "optimizer_kwargs": {"weight_decay": 0.1}},
        ],
        ids=["shared", "separate", "weight decay"],
    )
    @pytest.mark.parametrize("actions", ["box", "discrete"])
    def test_custom_extractors(self, actions: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ACTIONS, "custom", (ACTIONS[actions][0], ActorCriticPolicy, kwargs))
        compare("fused", "custom", settings_for("custom"), COEFFICIENTS, n_updates=3)
        policy, buffer = make_case("custom")
        engine, reason = select_engine("auto", policy, SETTINGS, buffer)
        assert type(engine) is FusedEngine
        assert engine.name == "fused"
        assert reason == "native cannot run the policy: its features extractor is Doubled"

    @pytest.mark.parametrize("learn_features", [False, True])
    def test_gsde_with_a_custom_extractor(self, learn_features: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        kwargs = {"features_extractor_class": Doubled, "use_sde": True, "full_std": False}
        monkeypatch.setitem(ACTIONS, "custom", (BOX, ActorCriticPolicy, kwargs))
        policies, norms = [], []
        for engine_class in (AutogradEngine, FusedEngine):
            policy, buffer = make_case("custom")
            policy.action_dist.learn_features = learn_features
            np.random.seed(0)
            statistics = engine_class(policy, settings_for("custom")).update(buffer, COEFFICIENTS)
            policies.append(policy)
            norms.append(statistics.read()["grad_norm"])
        assert_same_training(policies[1], policies[0])
        assert norms[1] == pytest.approx(norms[0], rel=1e-3)

    def test_parameters_that_no_loss_reaches_do_not_change(self) -> None:
        policies = [make_case("box")[0] for _ in range(2)]
        buffer = make_case("box")[1]
        for policy, engine_class in zip(policies, (AutogradEngine, FusedEngine), strict=True):
            policy.unused = th.nn.Parameter(th.ones(2))
            policy.optimizer = th.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.5)
            engine = engine_class(policy, settings_for("box"))
            for _ in range(2):
                np.random.seed(0)
                assert engine.fits(buffer)
                engine.update(buffer, COEFFICIENTS)
            assert policy.unused.tolist() == [1, 1]
            assert policy.unused.grad is None
        for ours, theirs in zip(*(policy.parameters() for policy in policies), strict=True):
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("target_kl", [None, 1.0])
    def test_parameters_that_some_minibatches_reach_step_as_often(
        self, target_kl: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kwargs = {"features_extractor_class": Switching, "optimizer_kwargs": {"weight_decay": 0.1}}
        monkeypatch.setitem(ACTIONS, "custom", (BOX, ActorCriticPolicy, kwargs))
        results = []
        for engine_class in (AutogradEngine, FusedEngine):
            policy, buffer = make_case("custom")
            settings = settings_for("custom", n_epochs=4, target_kl=target_kl)
            np.random.seed(0)
            engine = engine_class(policy, settings)
            statistics = engine.update(buffer, COEFFICIENTS).read()
            assert engine.fits(buffer)
            engine.update(buffer, COEFFICIENTS)
            steps = [float(state["step"]) for state in policy.optimizer.state.values()]
            results.append((statistics, steps, policy))
        assert len(set(results[0][1])) == 2, "all minibatches reach the same parameters"
        assert results[1][1] == results[0][1]
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-3, abs=2e-5)
        assert_same_training(results[1][2], results[0][2])

    def test_parameters_that_a_later_update_reaches_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ACTIONS, "custom", (BOX, ActorCriticPolicy, {"features_extractor_class": Gated}))
        policies = []
        for engine_class in (AutogradEngine, FusedEngine):
            policy, buffer = make_case("custom")
            engine = engine_class(policy, settings_for("custom"))
            for is_open in (False, True):
                policy.features_extractor.is_open = is_open
                np.random.seed(0)
                assert engine.fits(buffer)
                engine.update(buffer, COEFFICIENTS)
            policies.append(policy)
        steps = {float(state["step"]) for state in policies[0].optimizer.state.values()}
        assert steps == {8.0, 16.0}
        assert_same_training(policies[1], policies[0])

    def test_tensors_that_a_layer_replaces_in_its_forward_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ACTIONS, "custom", (BOX, ActorCriticPolicy, {"features_extractor_class": Bounded}))
        policies = []
        for engine_class in (AutogradEngine, FusedEngine):
            policy, buffer = make_case("custom", moved=0.0)
            np.random.seed(0)
            engine_class(policy, settings_for("custom")).update(buffer, COEFFICIENTS)
            policies.append(policy)
        scale = policies[0].features_extractor.scale
        assert scale.max() > 2.001 or scale.min() < 2.0
        assert_same_training(policies[1], policies[0])

    def test_ctrl_c_leaves_the_optimizer_with_the_steps_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy, buffer = make_case("box")
        batches = list(buffer.get(8))

        def interrupted(_: int) -> Any:
            yield from batches[:2]
            raise KeyboardInterrupt

        monkeypatch.setattr(buffer, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            FusedEngine(policy, settings_for("box")).update(buffer, COEFFICIENTS)
        assert {float(state["step"]) for state in policy.optimizer.state.values()} == {2.0}

    @pytest.mark.parametrize("engine_class", [AutogradEngine, FusedEngine])
    def test_minibatches_without_the_old_distribution_are_refused(self, engine_class: type[Any]) -> None:
        policy = make_policy("box")
        buffer = collect(policy, ForeignBuffer(N_STEPS, OBS, BOX, "cpu", n_envs=N_ENVS, dist_param_dim=4), 0.1)
        with pytest.raises(ValueError, match="must return minibatches with `old_dist_params`, got RolloutBuffer"):
            engine_class(policy, settings_for("box")).update(buffer, COEFFICIENTS)

    @pytest.mark.parametrize("layout", ["sliced", "turned"])
    @pytest.mark.parametrize("name", ["discrete", "box", "multi_binary"])
    def test_last_layers_may_give_their_outputs_in_any_layout(self, layout: str, name: str) -> None:
        results = []
        for engine_class in (AutogradEngine, FusedEngine):
            policy, buffer = make_case(name)
            policy.action_net.forward = functools.partial(LAYOUTS[layout], policy.action_net)
            engine = engine_class(policy, settings_for(name))
            engine.begin_rollout(buffer)
            th.manual_seed(0)
            acted = engine.act(th.as_tensor(buffer.observations[0]), with_dist_params=True)
            np.random.seed(0)
            engine.update(buffer, COEFFICIENTS)
            results.append((acted, policy))
        (theirs, slow_policy), (ours, policy) = results
        for mine, other in ((ours.actions, theirs.actions), (ours.log_prob, theirs.log_prob)):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
        assert_same_training(policy, slow_policy)

    @pytest.mark.parametrize("share", [True, False], ids=["shared", "not_shared"])
    def test_images(self, share: bool) -> None:
        """A convolutional policy, with uint8 images."""
        space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        rng = np.random.default_rng(0)
        buffer = TensorRolloutBuffer(4, space, spaces.Discrete(2), "cpu", n_envs=4, dist_param_dim=2)
        results = []
        for engine_class in (AutogradEngine, FusedEngine):
            th.manual_seed(0)
            policy = ActorCriticCnnPolicy(space, spaces.Discrete(2), lambda _: 3e-4, share_features_extractor=share)
            if not results:
                buffer.reset()
                for _ in range(4):
                    obs = rng.integers(0, 255, (4, 1, 36, 36), dtype=np.uint8)
                    acted = engine_class(policy, SETTINGS).act(th.as_tensor(obs), with_dist_params=True)
                    row = (acted.actions.reshape(4, 1), rng.normal(size=4), np.zeros(4), acted.values, acted.log_prob)
                    buffer.add(obs, *row, acted.dist_params)
                buffer.compute_returns_and_advantage(th.from_numpy(acted.values), np.zeros(4, bool))
            np.random.seed(0)
            settings = dataclasses.replace(SETTINGS, discrete_actions=True)
            results.append((engine_class(policy, settings).update(buffer, COEFFICIENTS).read(), policy.parameters()))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-3, abs=2e-5)
        for ours, theirs in zip(results[1][1], results[0][1], strict=True):
            # Convolutions are summed in an order that depends on memory; Adam's first steps turn 1e-7 into up to 1e-5.
            th.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    def test_own_losses_run_on_autograd(self) -> None:
        _, buffer = make_case("box")
        policy = OwnEntropy(OBS, BOX, lambda _: 1e-3)
        assert type(select_engine("auto", policy, SETTINGS, buffer)[0]) is AutogradEngine

    def test_other_optimizers_squashed_actions_and_frozen_parameters_run_on_autograd(self) -> None:
        _, buffer = make_case("box")
        kwargs: dict[str, Any] = {"features_extractor_class": Doubled}
        sgd = ActorCriticPolicy(OBS, BOX, lambda _: 1e-3, optimizer_class=th.optim.SGD, **kwargs)
        squashed = ActorCriticPolicy(OBS, BOX, lambda _: 1e-3, use_sde=True, squash_output=True, **kwargs)
        frozen = ActorCriticPolicy(OBS, BOX, lambda _: 1e-3, **kwargs)
        engine = select_engine("auto", frozen, SETTINGS, buffer)[0]
        assert type(engine) is FusedEngine
        assert engine.fits(buffer)
        frozen.features_extractor.requires_grad_(False)
        assert not engine.fits(buffer)
        for policy in (sgd, squashed, frozen):
            assert type(select_engine("auto", policy, SETTINGS, buffer)[0]) is AutogradEngine

    def test_explicit_autograd_is_the_reference(self) -> None:
        """SB3_EQUIVALENT asks for it: its weights are SB3's to the last bit."""
        policy, buffer = make_case("box")
        assert type(select_engine("autograd", policy, SETTINGS, buffer)[0]) is AutogradEngine
