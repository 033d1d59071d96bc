"""Which policies native and fused can run, and the reasons against the others; also for policies changed later."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import TanhBijector
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from test_native import ACTIONS, BOX, OBS, SETTINGS, OtherExtractor, hook, make_buffer, make_policy

from sb3_clipvf.engines.native import NativeEngine
from sb3_clipvf.engines.support import why_not_fused, why_not_native
from sb3_clipvf.rollout import TensorRolloutBuffer


class OtherPolicy(ActorCriticPolicy):
    pass


class OtherBuffer(TensorRolloutBuffer):
    def get(self, batch_size: int | None = None) -> Any:
        yield from super().get(batch_size)


def replaced_head(policy: ActorCriticPolicy) -> None:
    policy.value_net = th.nn.Sequential(policy.value_net)


def one_mean(policy: ActorCriticPolicy) -> None:
    policy.action_net = th.nn.Linear(8, 1)
    policy.optimizer = th.optim.Adam(policy.parameters())


def added_parameter(policy: ActorCriticPolicy) -> None:
    policy.extra = th.nn.Parameter(th.zeros(1))


def unequal_steps(policy: ActorCriticPolicy) -> None:
    policy.action_net.bias.grad = th.zeros_like(policy.action_net.bias)
    policy.optimizer.step()


def own_state(key: str, change: Callable[[Any], object]) -> Callable[[ActorCriticPolicy], None]:
    """Return a change of the optimizer's state of one parameter, after a step of all."""

    def change_now(policy: ActorCriticPolicy) -> None:
        for parameter in policy.parameters():
            parameter.grad = th.zeros_like(parameter)
        policy.optimizer.step()
        state = policy.optimizer.state[policy.action_net.weight]
        state[key] = change(state[key])

    return change_now


def shared_weight(policy: ActorCriticPolicy) -> None:
    actor, critic = policy.mlp_extractor.policy_net[0], policy.mlp_extractor.value_net[0]
    critic.weight.data = actor.weight.data


def overlapping_weights(policy: ActorCriticPolicy) -> None:
    actor, critic = policy.mlp_extractor.policy_net[0].weight, policy.mlp_extractor.value_net[0].weight
    memory, n = th.zeros(2 * actor.numel() - 1), actor.numel()
    actor.data, critic.data = memory[:n].view_as(actor), memory[n - 1 :].view_as(critic)


def shared_gradient(policy: ActorCriticPolicy) -> None:
    policy.log_std.grad = policy.action_net.bias.grad = th.zeros(2)


def shared_moments(policy: ActorCriticPolicy) -> None:
    own_state("exp_avg", lambda moment: moment)(policy)
    state = policy.optimizer.state
    state[policy.log_std]["exp_avg"] = state[policy.action_net.bias]["exp_avg_sq"]


def one_vector(policy: ActorCriticPolicy) -> None:
    """Store all parameters side by side, and gradients that kernels do not use."""
    memory = th.nn.utils.parameters_to_vector(policy.parameters()).detach()
    th.nn.utils.vector_to_parameters(memory, policy.parameters())
    policy.log_std.grad = th.zeros(1).expand(2)


def other_activation(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.value_net[1] = th.nn.ReLU()


def own_log_std(shape: tuple[int, ...]) -> Callable[[ActorCriticPolicy], None]:
    def change(policy: ActorCriticPolicy) -> None:
        policy.log_std = th.nn.Parameter(th.zeros(shape))
        policy.optimizer = th.optim.Adam(policy.parameters())

    return change


class Residual(th.nn.Sequential):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) + 1.0


def own_network(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.policy_net = Residual(*policy.mlp_extractor.policy_net)


GSDE = {"use_sde": True}
MOMENTS = "its optimizer's moments are not contiguous float32 tensors like its parameters"
SHARED = "some of its parameters, gradients or moments share memory"
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Any], object], str]] = {
    "gsde squashed": ({**GSDE, "squash_output": True}, hook, "it squashes its actions"),
    "gsde squashed later": (
        GSDE,
        lambda p: setattr(p.action_dist, "bijector", TanhBijector()),
        "it squashes its actions",
    ),
    "gsde features": (GSDE, lambda p: setattr(p.action_dist, "learn_features", True), "its gSDE learns features"),
    "gsde epsilon": (GSDE, lambda p: setattr(p.action_dist, "epsilon", 1e-3), "its gSDE has the epsilon 0.001"),
    "gsde form": (
        GSDE,
        lambda p: setattr(p.action_dist, "full_std", False),
        r"its log_std has the shape \(8, 2\) instead of SB3's \(8, 1\)",
    ),
    "gsde shape": (GSDE, own_log_std((2,)), r"its log_std has the shape \(2,\) instead of SB3's \(8, 2\)"),
    "shape": ({}, own_log_std((1,)), r"its log_std has the shape \(1,\) instead of SB3's \(2,\)"),
    "extractor": ({"features_extractor_class": OtherExtractor}, hook, "its features extractor is OtherExtractor"),
    "activation": ({"activation_fn": th.nn.GELU}, hook, "its activation is GELU"),
    "elu": (
        {},
        lambda p: p.mlp_extractor.policy_net.__setitem__(1, th.nn.ELU(alpha=0.5)),
        r"its activation is ELU\(alpha=0.5\)",
    ),
    "elu later": (
        {"activation_fn": th.nn.ELU},
        lambda p: setattr(p.mlp_extractor.policy_net[1], "alpha", 0.5),
        r"its activation is ELU",
    ),
    "network": ({}, own_network, r"its network is a Residual, not torch\.nn\.Sequential"),
    "optimizer": ({"optimizer_class": th.optim.SGD}, hook, "its optimizer is SGD, not Adam or AdamW"),
    "amsgrad": ({"optimizer_kwargs": {"amsgrad": True}}, hook, "its optimizer uses amsgrad"),
    "maximize": ({"optimizer_kwargs": {"maximize": True}}, hook, "its optimizer uses maximize"),
    "groups": (
        {},
        lambda p: setattr(p, "optimizer", th.optim.Adam([{"params": [q]} for q in p.parameters()])),
        "several parameter groups",
    ),
    "fewer": (
        {},
        lambda p: setattr(p, "optimizer", th.optim.Adam(p.action_net.parameters())),
        "its optimizer has different parameters",
    ),
    "steps": ({}, unequal_steps, "different numbers of steps"),
    "state layout": ({}, own_state("exp_avg", lambda m: m.t().contiguous().t()), MOMENTS),
    "state shape": ({}, own_state("exp_avg_sq", lambda m: m[:1].clone()), MOMENTS),
    "state type": ({}, own_state("exp_avg_sq", th.Tensor.double), MOMENTS),
    "state without a moment": ({}, own_state("exp_avg", lambda _: None), MOMENTS),
    "state of numbers": ({}, own_state("step", float), "its optimizer has no tensors with the numbers of steps"),
    "head": ({}, replaced_head, r"its last layers are not torch\.nn\.Linear"),
    "one mean": ({}, one_mean, "the sizes of its layers do not fit each other, its observations or actions"),
    "shared weight": ({}, shared_weight, SHARED),
    "overlapping weights": ({}, overlapping_weights, SHARED),
    "shared gradient": ({}, shared_gradient, SHARED),
    "shared moments": ({}, shared_moments, SHARED),
    "extra": ({}, added_parameter, "parameters other than those"),
    "double": ({}, lambda p: p.double(), "not contiguous float32"),
    "frozen": ({}, lambda p: p.log_std.requires_grad_(False), "some of its parameters are frozen"),
    "method": ({}, lambda p: setattr(p, "forward", p.forward), r"its forward\(\) was replaced"),
    "layer's method": (
        {},
        lambda p: setattr(p.action_net, "forward", p.action_net.forward),
        r"the forward\(\) of a Linear was replaced",
    ),
    "parameter hook": ({}, lambda p: p.action_net.weight.register_hook(hook), "it has hooks"),
    "hook": ({}, lambda p: p.action_net.register_forward_hook(hook), "it has hooks"),
    "optimizer hook": ({}, lambda p: p.optimizer.register_step_pre_hook(hook), "its optimizer has hooks"),
    "mixed": ({}, other_activation, "actor and critic have different activations"),
}


# Those whose networks torch runs, but kernels neither compute their losses nor make their steps.
ALSO_NOT_FUSED = frozenset(
    ("gsde squashed", "gsde squashed later", "shape", "optimizer", "amsgrad", "maximize", "groups", "fewer")
    + ("one mean", "double", "frozen", "method", "optimizer hook")
    + tuple(case for case in REFUSED if case.startswith("state "))
)


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_reason(self, case: str) -> None:
        kwargs, change, reason = REFUSED[case]
        policy = make_policy(**kwargs)
        change(policy)
        assert_matches(reason, why_not_native(policy, make_buffer(make_policy())))

    # The optimizer does not hold the "extra" parameter, which fused refuses.
    @pytest.mark.parametrize("case", [case for case in REFUSED if case != "extra"])
    def test_fused_refuses_what_its_kernels_compute(self, case: str) -> None:
        kwargs, change, reason = REFUSED[case]
        policy = make_policy(**kwargs)
        change(policy)
        if case in ALSO_NOT_FUSED:
            assert_matches(reason, why_not_fused(policy))
        else:
            assert why_not_fused(policy) is None

    @pytest.mark.parametrize("case", [case for case in REFUSED if REFUSED[case][1] is not hook and case != "steps"])
    def test_a_policy_that_was_changed_later_no_longer_fits(self, case: str) -> None:
        policy = make_policy(**REFUSED[case][0])
        engine = NativeEngine(policy, SETTINGS)
        assert engine.fits(make_buffer(policy))
        REFUSED[case][1](policy)
        assert not engine.fits(make_buffer(make_policy()))

    def test_subclass(self) -> None:
        policy = OtherPolicy(OBS, BOX, lambda _: 1e-3)
        assert_matches(
            "its class is OtherPolicy, and only MlpPolicy itself", why_not_native(policy, make_buffer(policy))
        )

    def test_observations(self) -> None:
        image = ActorCriticCnnPolicy(spaces.Box(0, 255, (3, 36, 36), np.uint8), BOX, lambda _: 1e-3)
        numbers = ActorCriticPolicy(spaces.Discrete(4), BOX, lambda _: 1e-3)
        pixels = ActorCriticPolicy(spaces.Box(0, 255, (36, 36, 3), np.uint8), BOX, lambda _: 1e-3)
        buffer = make_buffer(make_policy())
        assert_matches("its class is ActorCriticCnnPolicy", why_not_native(image, buffer))
        assert_matches("its observations are Discrete", why_not_native(numbers, buffer))
        assert_matches("its observations are images", why_not_native(pixels, buffer))

    def test_buffer(self) -> None:
        other = OtherBuffer(8, OBS, BOX, "cpu", n_envs=4, dist_param_dim=4)
        assert_matches("its rollout buffer is OtherBuffer", why_not_native(make_policy(), other))

    def test_a_buffer_that_was_replaced_later(self) -> None:
        policy = make_policy()
        engine = NativeEngine(policy, SETTINGS)
        for _ in range(2):
            assert engine.fits(make_buffer(policy))
            assert not engine.fits(OtherBuffer(8, OBS, BOX, "cpu", n_envs=4, dist_param_dim=4))

    def test_parameters_side_by_side_are_run(self) -> None:
        policy = make_policy()
        one_vector(policy)
        assert why_not_native(policy, make_buffer(policy)) is None

    @pytest.mark.parametrize("actions", ACTIONS)
    def test_plain_policies_are_run(self, actions: str) -> None:
        policy = make_policy(actions)
        assert why_not_native(policy, make_buffer(policy)) is None


def assert_matches(pattern: str, reason: str | None) -> None:
    assert reason is not None
    assert re.search(pattern, reason)
