"""Updates over static tensors. tests/test_engines.py and test_nonfinite.py have their numbers."""

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor
from tape import Tape
from test_engines import (
    BOX,
    COEFFICIENTS,
    N_TRANSITIONS,
    OBS,
    SETTINGS,
    assert_same_training,
    collect,
    make_case,
    settings_for,
)

from sb3_clipvf.distributions import dist_params, kl_from_params
from sb3_clipvf.engines.autograd import AutogradEngine, unvalidated_distributions
from sb3_clipvf.engines.cuda import static_step
from sb3_clipvf.engines.cuda.static_distributions import short_distribution
from sb3_clipvf.engines.cuda.static_loss import StaticLoss
from sb3_clipvf.engines.cuda.static_policy import ImageScaling
from sb3_clipvf.engines.cuda.static_step import StaticEngine, chunks, policy_structure
from sb3_clipvf.engines.support import why_not_cuda_graph, why_not_static
from sb3_clipvf.policies import SquashedActorCriticCnnPolicy, SquashedMultiInputActorCriticPolicy
from sb3_clipvf.rollout import TensorRolloutBuffer


def test_chunks_have_at_most_32_minibatches() -> None:
    assert chunks(30, 8) == [(8, 8, 8, 6)]
    assert chunks(30, 100) == [(30,)]
    assert chunks(2 * 32 + 1, 2) == [(2,) * 32, (1,)]
    assert chunks(64 * 2, 2) == [(2,) * 32, (2,) * 32]


@pytest.mark.parametrize("chunk", [1, 3])
def test_an_epoch_of_several_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four minibatches in chunks of one, or of three and one that is smaller."""
    policies = []
    for engine_class in (AutogradEngine, StaticEngine):
        monkeypatch.setattr(static_step, "CHUNK", chunk)
        policy, buffer = make_case("box")
        np.random.seed(0)
        policies.append((policy, engine_class(policy, settings_for("box")).update(buffer, COEFFICIENTS).read()))
    assert_same_training(policies[1][0], policies[0][0])
    assert policies[1][1] == pytest.approx(policies[0][1], rel=1e-3, abs=2e-5)


IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICT = spaces.Dict({"image": IMAGE, "vector": OBS, "kind": spaces.Discrete(3)})
POLICIES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any], type[ActorCriticPolicy], dict[str, Any]]] = {
    "cnn": (IMAGE, spaces.Discrete(2), ActorCriticCnnPolicy, {}),
    "cnn, separate": (IMAGE, spaces.Discrete(2), ActorCriticCnnPolicy, {"share_features_extractor": False}),
    "dict": (DICT, BOX, MultiInputActorCriticPolicy, {}),
    "squashed gsde": (OBS, BOX, ActorCriticPolicy, {"use_sde": True, "squash_output": True}),
    "squashed cnn": (IMAGE, BOX, SquashedActorCriticCnnPolicy, {}),
    "squashed dict": (DICT, BOX, SquashedMultiInputActorCriticPolicy, {}),
    "discrete observations": (spaces.Discrete(5), spaces.Discrete(2), ActorCriticPolicy, {}),
    "gelu": (OBS, BOX, ActorCriticPolicy, {"activation_fn": th.nn.GELU}),
}


def collected(
    observations: spaces.Space[Any],
    actions: spaces.Space[Any],
    policy_class: type[ActorCriticPolicy],
    kwargs: dict[str, Any],
    device: str = "cpu",
) -> tuple[ActorCriticPolicy, TensorRolloutBuffer]:
    """Return a policy and a rollout of four steps of four environments with random observations."""
    th.manual_seed(0)
    policy = policy_class(observations, actions, lambda _: 3e-4, **kwargs).to(device)
    if kwargs.get("use_sde"):  # its noise stays on the device that the policy was built on
        policy.reset_noise(4)
    width = StaticEngine(policy, SETTINGS).act(sample(observations, device), with_dist_params=True).dist_params
    assert width is not None
    buffer = TensorRolloutBuffer(4, observations, actions, device, n_envs=4, dist_param_dim=width.shape[1])
    buffer.reset()
    rng = np.random.default_rng(0)
    for _ in range(4):
        obs = sample(observations, device)
        if kwargs.get("use_sde"):
            policy.reset_noise(4)
        acted = AutogradEngine(policy, SETTINGS).act(obs, with_dist_params=True)
        row: Any = (
            {key: part.cpu().numpy() for key, part in obs.items()} if isinstance(obs, dict) else obs.cpu().numpy()
        )
        buffer.add(
            row,
            acted.actions.reshape(4, -1),
            rng.normal(size=4),
            np.zeros(4),
            acted.values,
            acted.log_prob,
            acted.dist_params,
        )
    buffer.compute_returns_and_advantage(th.from_numpy(acted.values), np.zeros(4, bool))
    return policy, buffer


def sample(space: spaces.Space[Any], device: str) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: sample(part, device) for key, part in space.spaces.items()}
    space.seed(1)
    return th.as_tensor(np.stack([space.sample() for _ in range(4)]), device=device)


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name: str) -> None:
    results = []
    for engine_class in (AutogradEngine, StaticEngine):
        policy, buffer = collected(*POLICIES[name])
        assert why_not_static(policy, buffer) is None
        settings = dataclasses.replace(
            SETTINGS, batch_size=6, discrete_actions=isinstance(policy.action_space, spaces.Discrete)
        )
        np.random.seed(0)
        th.manual_seed(0)
        engine = engine_class(policy, settings)
        numbers = [engine.update(buffer, COEFFICIENTS).read() for _ in range(2)]
        results.append((numbers, policy))
    for ours, theirs in zip(results[1][0], results[0][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5)
    for ours, theirs in zip(results[1][1].parameters(), results[0][1].parameters(), strict=True):
        # Convolutions are summed in an order that depends on memory; Adam's first steps turn 1e-7 into up to 1e-5.
        th.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ when a step is built again


def replace_moments(policy: Any) -> None:
    policy.optimizer.load_state_dict(copy.deepcopy(policy.optimizer.state_dict()))


def replace_layer(policy: Any) -> None:
    policy.action_net = th.nn.Linear(8, 2)
    policy.optimizer = th.optim.Adam(policy.parameters(), lr=3e-3)


def set_beta(policy: Any) -> None:
    policy.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def replace_data(policy: Any) -> None:
    policy.value_net.weight.data = policy.value_net.weight.data.clone()


def replace_activation(policy: Any) -> None:
    policy.mlp_extractor.policy_net[1] = th.nn.ELU()


def set_constant(policy: Any) -> None:
    policy.mlp_extractor.policy_net[1].negative_slope = 0.3


CHANGES = [replace_moments, replace_layer, set_beta, replace_data, replace_activation]


@pytest.mark.parametrize(("name", "change"), [*(("box", change) for change in CHANGES), ("leaky_relu", set_constant)])
def test_a_changed_policy_or_optimizer_gets_a_new_step(name: str, change: Callable[[Any], None]) -> None:
    policies, steps = [], []
    for engine_class in (AutogradEngine, StaticEngine):
        policy, buffer = make_case(name)
        engine = engine_class(policy, settings_for(name))
        for change_now in (lambda _: None, change):
            th.manual_seed(0)
            change_now(policy)
            np.random.seed(0)
            engine.update(buffer, COEFFICIENTS)
            steps.append(getattr(engine, "_step", None))
        policies.append(policy)
    assert steps[2] is not steps[3]
    assert_same_training(policies[1], policies[0])


def test_numbers_need_no_new_step() -> None:
    policies, steps = [], []
    for engine_class in (AutogradEngine, StaticEngine):
        policy, buffer = make_case("box")
        engine = engine_class(policy, settings_for("box", advantage_scope="rollout"))
        for factor in (1.0, 0.5):
            names = ("clip_range", "clip_range_vf", "ent_coef", "vf_coef", "kl_coef")
            changes = {name: factor * getattr(COEFFICIENTS, name) for name in names}
            policy.optimizer.param_groups[0]["lr"] *= factor
            buffer.advantages[:] *= factor
            buffer.observations[:] += factor
            np.random.seed(0)
            engine.update(buffer, dataclasses.replace(COEFFICIENTS, **changes))
            steps.append(getattr(engine, "_step", None))
        policies.append(policy)
    assert steps[2] is steps[3]
    assert_same_training(policies[1], policies[0])


@pytest.mark.parametrize("changes", [{"clip_range": None}, {"clip_range_vf": None}, {"kl_coef": 0.0}], ids=str)
def test_a_term_that_ends_gets_a_new_step(changes: dict[str, Any]) -> None:
    policies = []
    for engine_class in (AutogradEngine, StaticEngine):
        policy, buffer = make_case("box")
        engine = engine_class(policy, settings_for("box"))
        for coefficients in (COEFFICIENTS, dataclasses.replace(COEFFICIENTS, **changes), COEFFICIENTS):
            np.random.seed(0)
            engine.update(buffer, coefficients)
        policies.append(policy)
    assert_same_training(policies[1], policies[0])


def test_ctrl_c_leaves_the_optimizer_with_the_steps_made(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, buffer = make_case("box")
    engine = StaticEngine(policy, settings_for("box"))
    run, n_chunks = engine._run_chunk, 0

    def interrupted(*args: Any) -> None:
        nonlocal n_chunks
        n_chunks += 1
        if n_chunks == 2:
            raise KeyboardInterrupt
        run(*args)

    monkeypatch.setattr(engine, "_run_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.update(buffer, COEFFICIENTS)
    assert {float(state["step"]) for state in policy.optimizer.state.values()} == {4.0}  # of the first epoch


def test_the_permutations_are_those_of_get() -> None:
    _, buffer = make_case("box")
    np.random.seed(3)
    drawn = buffer.draw_rows()
    after = np.random.rand()
    np.random.seed(3)
    batch = next(buffer.get())
    assert np.random.rand() == after
    assert th.equal(batch.returns, th.from_numpy(buffer.returns).flatten()[drawn])
    assert len(drawn) == N_TRANSITIONS


def test_the_gradients_stand_in_the_parameters() -> None:
    gradients = []
    for engine_class in (AutogradEngine, StaticEngine):
        policy, buffer = make_case("box")
        np.random.seed(0)
        engine_class(policy, settings_for("box")).update(buffer, COEFFICIENTS)
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not hasattr(th.backends, "fp32_precision"), reason="torch 2.9 added these switches")
def test_switches_of_precision_are_noticed() -> None:
    """Once one is set, torch's older getters raise errors."""
    policy, _ = make_case("box")
    switches: list[Any] = [th.backends.cuda.matmul, th.backends.cudnn.conv]
    before = [switch.fp32_precision for switch in switches]
    found = [policy_structure(policy)]
    try:
        for switch, precision in zip(switches, ("tf32", "ieee"), strict=True):
            switch.fp32_precision = precision
            found.append(policy_structure(policy))
        with pytest.raises(RuntimeError):
            th.get_float32_matmul_precision()
    finally:
        for switch, precision in zip(reversed(switches), reversed(before), strict=True):
            switch.fp32_precision = precision
    assert found[0] != found[1] != found[2] and found[0] == policy_structure(policy)


@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.AdamW])
def test_a_parameter_that_the_loss_does_not_reach_stays(optimizer: Any) -> None:
    policies = []
    for engine_class in (AutogradEngine, StaticEngine):
        policy, buffer = make_case("box")
        policy.unused = th.nn.Linear(3, 2)
        policy.optimizer = optimizer(policy.parameters(), lr=1e-3)
        before = policy.unused.weight.clone()
        engine = engine_class(policy, settings_for("box"))
        for number in range(3):
            np.random.seed(number)
            assert engine.fits(buffer)
            engine.update(buffer, COEFFICIENTS)
            # A file of the model has the optimizer's state.
            policy.optimizer.load_state_dict(copy.deepcopy(policy.optimizer.state_dict()))
        assert th.equal(policy.unused.weight, before) and policy.unused.weight.grad is None
        policies.append(policy)
    ours, theirs = (dict(policy.named_parameters()) for policy in policies)
    for name in ours.keys() - {"unused.weight", "unused.bias"}:
        th.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_parameters_have_their_own_numbers_of_steps() -> None:
    policies = []
    for engine_class in (AutogradEngine, StaticEngine):
        policy, buffer = make_case("box")
        engine = engine_class(policy, settings_for("box"))
        for number in range(2):
            np.random.seed(number)
            assert engine.fits(buffer)
            engine.update(buffer, COEFFICIENTS)
            if number == 0:
                for parameter in policy.action_net.parameters():
                    for tensor in policy.optimizer.state[parameter].values():
                        tensor.zero_()
        policies.append(policy)
    assert_same_training(policies[1], policies[0])


def test_what_needs_no_network_is_computed_once_for_a_chunk() -> None:
    policy, buffer = make_case("box")
    step = StaticEngine(policy, settings_for("box"))._bind(buffer, COEFFICIENTS)
    counts = []
    for sizes in ((8,), (8, 8), (8, 8, 8)):
        tape = Tape()
        with unvalidated_distributions, tape:
            step.run(sizes, False)
        names = tape.names()
        assert sum("_foreach_copy_" in name for name in names) == 1
        assert sum("std" in name for name in names) == 1  # of the advantages
        counts.append(len(names))
    assert not (step._loss.values.requires_grad or step._loss.log_ratio.requires_grad)  # their graphs are freed
    of_minibatch = counts[1] - counts[0]
    assert counts[2] - counts[1] == of_minibatch < 0.85 * counts[0]


def test_images_are_scaled_by_one_operation_as_in_sb3() -> None:
    policy, _ = collected(*POLICIES["dict"])
    parts = {"image": th.arange(256, dtype=th.uint8).reshape(1, 1, 16, 16), "vector": th.ones(1, 3)}
    scaling = ImageScaling(policy)
    tape = Tape()
    with tape:
        scaled = scaling(parts)
    assert [name for name in tape.names() if "empty" not in name] == ["aten.div.out"]
    assert th.equal(scaled["image"], parts["image"].float() / 255.0) and scaled["vector"] is parts["vector"]
    with scaling.policy_scaling_off():
        assert th.equal(preprocess_obs(scaled["image"], IMAGE, policy.normalize_images), scaled["image"])
    assert policy.normalize_images


def test_images_that_sb3_does_not_scale_stay() -> None:
    policy = ActorCriticCnnPolicy(IMAGE, BOX, lambda _: 1e-3, normalize_images=False)
    images = th.zeros(1, 1, 36, 36)
    assert ImageScaling(policy)({"": images})[""] is images


@pytest.mark.parametrize("name", ["box", "discrete"])
def test_short_distributions_are_sb3s(name: str) -> None:
    policy, buffer = make_case(name)
    dist: Any = policy.action_dist
    short: Any = short_distribution(dist)
    params = [th.randn(6, 3 if name == "discrete" else 2, dtype=th.float64).requires_grad_()]
    if name == "box":
        params.append(th.tensor([0.3, -0.2], dtype=th.float64).requires_grad_())
    actions = th.tensor([0, 1, 2, 0, 1, 2]) if name == "discrete" else th.randn(6, 2, dtype=th.float64)
    old = dist_params(dist.proba_distribution(*(0.5 * param.detach() for param in params)))
    results = []
    for each in (short, dist):
        each.proba_distribution(*params)
        numbers = [each.log_prob(actions), each.entropy().mean()]
        numbers.append(each.kl_from(old) if each is short else kl_from_params(dist, old))
        slopes = [th.autograd.grad(number.square().sum(), params, retain_graph=True) for number in numbers[::2]]
        results.append((numbers, slopes, th.autograd.grad(numbers[1], params[-1])))
    th.testing.assert_close(results[0], results[1])
    assert th.equal(results[0][0][0], results[1][0][0])  # log-probabilities
    StaticEngine(policy, settings_for(name)).update(buffer, COEFFICIENTS)
    assert policy.action_dist is dist


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_an_action_that_a_callback_has_masked(kl_coef: float) -> None:
    """A bias of -inf makes an action impossible. Entropy, KL and gradients stay finite."""
    trained = []
    for engine_class in (AutogradEngine, StaticEngine):
        policy, buffer = make_case("discrete")
        with th.no_grad():
            policy.action_net.bias[1] = -th.inf
        collect(policy, buffer, 0.1)
        np.random.seed(0)
        engine = engine_class(policy, settings_for("discrete", needs_kl=True))
        coefficients = dataclasses.replace(COEFFICIENTS, ent_coef=0.1, kl_coef=kl_coef)
        trained.append((policy, engine.update(buffer, coefficients).read()))
    assert_same_training(trained[1][0], trained[0][0])
    assert trained[1][1] == pytest.approx(trained[0][1], rel=1e-3, abs=2e-5)
    assert all(np.isfinite(numbers).all() for numbers in trained[1][1].values())


def test_other_distributions_are_not_replaced() -> None:
    for name in ("multi_discrete", "multi_binary", "gsde", "squashed"):
        assert short_distribution(make_case(name)[0].action_dist) is None


@pytest.mark.parametrize("clip_range", [0.1, None])
def test_the_slope_is_the_surrogates_derivative(clip_range: float | None) -> None:
    policy, buffer = make_case("box")
    coefficients = dataclasses.replace(COEFFICIENTS, clip_range=clip_range)
    loss = StaticLoss(policy, settings_for("box"), coefficients, th.zeros(4), None)
    loss.load(coefficients, None)
    log_ratio = th.linspace(-0.5, 0.5, 12).repeat(3).requires_grad_()
    advantages = th.tensor([1.5, -0.5, 0.0]).repeat_interleave(12)
    expected = -loss._surrogate(log_ratio.exp(), advantages)
    value, slope = loss._surrogate_and_slope(log_ratio.detach().exp(), advantages)
    th.testing.assert_close(value, expected.detach())
    th.testing.assert_close(slope, th.autograd.grad(expected, log_ratio)[0])


# ------------------------------------------------------------------ which policies


class Custom(FlattenExtractor):
    """An extractor with code of its own."""


def make(**kwargs: Any) -> ActorCriticPolicy:
    return ActorCriticPolicy(OBS, BOX, lambda _: 1e-3, **kwargs)


def with_dropout() -> ActorCriticPolicy:
    policy = make()
    policy.mlp_extractor.policy_net.append(th.nn.Dropout())
    return policy


def with_hook() -> ActorCriticPolicy:
    policy = make()
    policy.mlp_extractor.policy_net[0].register_forward_hook(lambda *_: None)
    return policy


def with_method() -> ActorCriticPolicy:
    policy = make()
    policy.action_net.forward = policy.action_net.forward
    return policy


def frozen() -> ActorCriticPolicy:
    policy = make()
    policy.value_net.requires_grad_(False)
    return policy


def with_one_log_std() -> ActorCriticPolicy:
    policy = make()
    policy.log_std = th.nn.Parameter(th.zeros(1))
    policy.optimizer = th.optim.Adam(policy.parameters())
    return policy


def with_transposed_moment() -> ActorCriticPolicy:
    policy = make()
    weight = policy.action_net.weight
    moments = {name: th.zeros(weight.shape[::-1]).t() for name in ("exp_avg", "exp_avg_sq")}
    policy.optimizer.state[weight] = {"step": th.tensor(1.0), **moments}
    return policy


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (lambda: make(features_extractor_class=Custom), "it has a Custom, which may not run the same operations"),
        (with_dropout, "it has a Dropout, which may not run the same operations"),
        (with_hook, "it has hooks"),
        (with_method, r"the forward\(\) of a Linear was replaced"),
        (frozen, "some of its parameters are frozen"),
        (with_one_log_std, r"its log_std has the shape \(1,\) instead of SB3's \(2,\)"),
        (with_transposed_moment, "its optimizer's moments are not contiguous float32 tensors like its parameters"),
        (lambda: make(optimizer_class=th.optim.SGD), "its optimizer is SGD, not Adam or AdamW"),
        (lambda: make().double(), "its parameters are not contiguous float32 tensors"),
    ],
)
def test_policies_that_may_change_are_not_run(policy: Callable[[], ActorCriticPolicy], reason: str) -> None:
    _, buffer = make_case("box")
    found = why_not_static(policy(), buffer)
    assert found is not None
    assert re.match(reason, found)


def test_autocast_is_not_run() -> None:
    policy, buffer = make_case("box")
    with th.autocast("cpu"):
        assert why_not_static(policy, buffer) == "torch's autocast is on"
    assert why_not_static(policy, buffer) is None


def test_a_cuda_graph_needs_a_gpu() -> None:
    policy, buffer = make_case("box")
    assert why_not_cuda_graph(policy, buffer) == "it is on the device cpu"


def test_other_buffers_are_not_run() -> None:
    class Other(TensorRolloutBuffer):
        def get(self, batch_size: int | None = None) -> Any:
            return super().get(batch_size)

    policy, _ = make_case("box")
    assert why_not_static(policy, Other(4, OBS, BOX, "cpu")) == "its rollout buffer is Other"
