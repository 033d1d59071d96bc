"""
The CUDA graph engine. Without a GPU, a stand-in replays the captured functions by calling them again.

`pytest -m cuda` runs the tests that need a GPU; they are skipped without one.
"""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv
from tape import SharedTapeCapturer
from test_engines import ACTIONS, BOX, COEFFICIENTS, OBS, SETTINGS
from test_engines_cuda_static_step import POLICIES, collected, sample

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint import TrainingCheckpoint
from sb3_clipvf.common.nonfinite import BadMinibatchError
from sb3_clipvf.engines import cuda_graph
from sb3_clipvf.engines.autograd import AutogradEngine, unvalidated_distributions
from sb3_clipvf.engines.cuda import static_step
from sb3_clipvf.engines.cuda.static_step import StaticEngine, StaticStep
from sb3_clipvf.engines.cuda_graph import Bfloat16Engine, CudaGraphEngine, GraphCapturer
from sb3_clipvf.engines.selection import is_surpassed, select_engine
from sb3_clipvf.engines.support import why_not_bf16

# SB3's advice for MLPs
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to run (Clip)?PPO on the GPU")
needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not th.cuda.is_available(), reason="there is no CUDA device")]
CASES = {name: (OBS, *case) for name, case in ACTIONS.items()} | POLICIES


class Repeated:
    """A stand-in for a graph: it calls the captured function again."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


class StandIn:
    """A stand-in for the capturer, on devices without graphs."""

    def __init__(self, device: th.device) -> None:
        pass

    def capture(self, run: Callable[[], None], warm_up: Callable[[], None], **_: Any) -> Repeated:
        random_state = th.get_rng_state()
        warm_up()
        th.set_rng_state(random_state)
        return Repeated(run)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(cuda_graph, "GraphCapturer", StandIn)
        monkeypatch.setattr(cuda_graph, "why_not_cuda_graph", static_step.why_not_static)
    # Other convolutions differ from run to run by more than the tolerances.
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(th.backends.cudnn, "deterministic", True)
    return str(request.param)


@pytest.fixture
def n_captures(device: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list whose only number counts captures."""
    count = [0]
    capturer: Any = cuda_graph.GraphCapturer
    capture = capturer.capture

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return capture(*args, **kwargs)

    monkeypatch.setattr(capturer, "capture", counted)
    return count


def make(name: str, device: str) -> tuple[ActorCriticPolicy, Any]:
    policy, buffer = collected(*CASES[name], device=device)
    with th.no_grad():
        rng = np.random.default_rng(1)
        for parameter in policy.parameters():  # so that ratios are not 1
            noise = th.as_tensor(rng.normal(size=parameter.shape), dtype=th.float32, device=device)
            parameter += 0.02 * noise
    return policy, buffer


def settings_of(policy: Any, **changes: Any) -> Any:
    discrete = isinstance(policy.action_space, spaces.Discrete)
    return dataclasses.replace(SETTINGS, batch_size=6, discrete_actions=discrete, **changes)


def assert_equal_policies(ours: Any, theirs: Any) -> None:
    has_convolutions = any("cnn" in name for name, _ in ours.named_parameters())
    # As in tests/test_engines.py; convolutions are summed in an order that depends on the algorithm.
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if has_convolutions else {"rtol": 1e-4, "atol": 1e-5}
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        th.testing.assert_close(parameter, other, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        state, other_state = ours.optimizer.state[parameter], theirs.optimizer.state[other]
        assert float(state["step"]) == float(other_state.get("step", 0.0))
        assert state["step"].device.type == "cpu"


def run_both(
    name: str, device: str, n_updates: int = 3, change: Any = None, coefficients: Any = COEFFICIENTS, **changes: Any
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Run updates by autograd and by graphs on one device; compare policies, and return the statistics."""
    policies, results = [], []
    for engine_class in (AutogradEngine, CudaGraphEngine):
        policy, buffer = make(name, device)
        engine = engine_class(policy, settings_of(policy, **changes))
        np.random.seed(0)
        th.manual_seed(0)
        numbers = []
        for number in range(n_updates):
            if change is not None and number == 1:
                change(policy, engine)
            numbers.append(engine.update(buffer, coefficients).read())
        policies.append(policy)
        results.append(numbers)
    assert_equal_policies(policies[1], policies[0])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=5e-5)
    return results[1], results[0]


# ------------------------------------------------------------------ updates


# The entropy of squashed policies is estimated from random numbers, which autograd draws in another order on a GPU.
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("squashed") or "gsde" in name])
def test_updates_equal_autograds(name: str, device: str) -> None:
    if device == "cuda" and name == "gsde_std_per_latent":
        policy, buffer = make(name, device)
        assert cuda_graph.why_not_cuda_graph(policy, buffer) == (
            "its gSDE has full_std=False, with which SB3 copies from the host at each step"
        )
        return
    run_both(name, device)


@pytest.mark.parametrize("name", ["squashed", "squashed cnn", "squashed dict"])
def test_squashed_policies_equal_autograds_without_an_entropy_bonus(name: str, device: str) -> None:
    policies = []
    coefficients = dataclasses.replace(COEFFICIENTS, ent_coef=0.0)
    for engine_class in (AutogradEngine, CudaGraphEngine):
        policy, buffer = make(name, device)
        np.random.seed(0)
        engine = engine_class(policy, settings_of(policy))
        for _ in range(2):
            engine.update(buffer, coefficients)
        policies.append(policy)
    assert_equal_policies(policies[1], policies[0])


@pytest.mark.parametrize("changes", [{}, {"clip_range": None}, {"clip_range_vf": None}, {"kl_coef": 0.0}], ids=str)
@pytest.mark.parametrize("settings", [{}, {"advantage_scope": "rollout"}, {"vf_clip": "prediction"}], ids=str)
def test_objectives(changes: dict[str, Any], settings: dict[str, Any], device: str) -> None:
    run_both("box", device, coefficients=dataclasses.replace(COEFFICIENTS, **changes), **settings)


def test_several_chunks(device: str, monkeypatch: pytest.MonkeyPatch, n_captures: list[int]) -> None:
    """Three minibatches, of which the last is smaller, in chunks of two; the last epoch also measures the KL."""
    monkeypatch.setattr(static_step, "CHUNK", 2)
    run_both("box", device, coefficients=dataclasses.replace(COEFFICIENTS, kl_coef=0.0))
    assert n_captures == [4]


@pytest.mark.parametrize("name", ["box", "discrete", "multi_discrete", "cnn", "gsde"])
def test_chunks_read_nothing_that_another_one_allocated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "GraphCapturer", SharedTapeCapturer)
    monkeypatch.setattr(static_step, "CHUNK", 2)
    engines: list[Any] = []
    coefficients = dataclasses.replace(COEFFICIENTS, kl_coef=0.0)
    run_both(name, "cpu", coefficients=coefficients, change=lambda _, engine: engines.append(engine))
    tapes, loss = engines[1]._capturer.tapes, engines[1]._step._loss
    assert len(tapes) == 4 and loss.values.isfinite().all()
    tapes[-1].spoil()
    assert loss.values.isnan().all()  # so it was overwritten before


def test_chunks_share_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        pytest.skip("needs graphs")
    monkeypatch.setattr(static_step, "CHUNK", 2)
    policy, buffer = make("box", device)
    engine = CudaGraphEngine(policy, settings_of(policy))
    engine.update(buffer, dataclasses.replace(COEFFICIENTS, kl_coef=0.0))
    assert len(engine._chunks) == 4 and len({graph.pool() for graph in engine._chunks.values()}) == 1


@pytest.mark.parametrize("target_kl", [1e-6, 0.01, 1e6])
def test_target_kl(target_kl: float, device: str) -> None:
    ours, theirs = run_both(
        "box", device, target_kl=target_kl, coefficients=dataclasses.replace(COEFFICIENTS, kl_coef=0.0)
    )
    assert [sorted(numbers) for numbers in ours] == [sorted(numbers) for numbers in theirs]


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_bad_minibatch_makes_no_step(on_nonfinite: str, device: str) -> None:
    results = []
    for engine_class in (AutogradEngine, CudaGraphEngine):
        policy, buffer = make("box", device)
        engine = engine_class(policy, settings_of(policy, on_nonfinite=on_nonfinite))
        np.random.seed(0)
        engine.update(buffer, COEFFICIENTS)
        buffer.advantages[2, 1] = np.nan
        buffer.forget_copies()
        if on_nonfinite == "raise":
            with pytest.raises(BadMinibatchError) as caught:
                engine.update(buffer, COEFFICIENTS)
            results.append((caught.value.epoch, caught.value.minibatch, caught.value.what, policy))
            assert th.isnan(caught.value.batch.advantages).any()
        else:
            statistics = engine.update(buffer, COEFFICIENTS)
            results.append((statistics.n_skipped, statistics.read().keys(), "", policy))
    assert results[0][:3] == results[1][:3]
    assert_equal_policies(results[1][3], results[0][3])


# ------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("name", ["box", "discrete", "cnn", "dict", "squashed"])
def test_bfloat16_differs_little(name: str, device: str) -> None:
    """bfloat16 has 8 bits, so that features differ by up to 0.4 %; the step is in nearly the same direction."""
    coefficients = dataclasses.replace(COEFFICIENTS, ent_coef=0.0)  # squashed policies draw for the entropy
    steps, numbers = [], []
    for engine_class in (AutogradEngine, Bfloat16Engine):
        policy, buffer = collected(*CASES[name], device=device)
        before = th.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
        np.random.seed(0)
        engine = engine_class(policy, settings_of(policy, n_epochs=1))
        numbers.append(engine.update(buffer, coefficients).read())
        steps.append(th.nn.utils.parameters_to_vector(policy.parameters()).detach() - before)
        assert "forward" not in vars(policy.action_net)
        assert all(parameter.dtype == th.float32 for parameter in policy.parameters())
        assert all(
            parameter.grad.dtype == th.float32 for parameter in policy.parameters() if parameter.grad is not None
        )
    assert th.nn.functional.cosine_similarity(*steps, dim=0) > 0.9
    assert not th.equal(*steps)
    assert numbers[1]["value_loss"] == pytest.approx(numbers[0]["value_loss"], rel=0.02)
    assert numbers[1]["grad_norm"] == pytest.approx(numbers[0]["grad_norm"], rel=0.05)
    assert numbers[1]["approx_kl"] == pytest.approx(numbers[0]["approx_kl"], abs=1e-3)


def test_bfloat16_acts_in_full_precision(device: str) -> None:
    policy, buffer = make("box", device)
    acted = []
    for engine_class in (CudaGraphEngine, Bfloat16Engine):
        engine = engine_class(policy, settings_of(policy))
        engine.begin_rollout(buffer)
        th.manual_seed(0)
        acted.append(engine.act(sample(OBS, device), with_dist_params=True))
    for ours, theirs in zip(acted[1][:4], acted[0][:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bfloat16_refuses_gsde() -> None:
    policy, buffer = make("gsde", "cpu")
    assert why_not_bf16(policy, buffer) == "its gSDE computes with features, which would be rounded"


# ------------------------------------------------------------------ when graphs are captured


def set_learning_rate(policy: Any, engine: Any) -> None:
    policy.optimizer.param_groups[0]["lr"] = 1e-4


def restart_moments(policy: Any, engine: Any) -> None:
    for parameter in policy.action_net.parameters():
        for tensor in policy.optimizer.state[parameter].values():
            tensor.zero_()


@pytest.mark.parametrize("change", [set_learning_rate, restart_moments])
def test_one_capture_serves_all_updates(change: Any, device: str, n_captures: list[int]) -> None:
    run_both("box", device, n_updates=4, change=change)
    assert n_captures == [1]


def replace_moments(policy: Any, engine: Any) -> None:
    policy.optimizer.load_state_dict(copy.deepcopy(policy.optimizer.state_dict()))


def set_eps(policy: Any, engine: Any) -> None:
    policy.optimizer.param_groups[0]["eps"] = 1e-3


def set_max_grad_norm(policy: Any, engine: Any) -> None:
    engine.settings = dataclasses.replace(engine.settings, max_grad_norm=0.01)


def set_batch_size(policy: Any, engine: Any) -> None:
    engine.settings = dataclasses.replace(engine.settings, batch_size=5)


def replace_data(policy: Any, engine: Any) -> None:
    policy.value_net.weight.data = policy.value_net.weight.data.clone()


@pytest.mark.parametrize("change", [replace_moments, set_eps, set_max_grad_norm, set_batch_size, replace_data])
def test_a_change_of_more_than_numbers_is_captured(change: Any, device: str, n_captures: list[int]) -> None:
    run_both("box", device, change=change)
    assert n_captures == [2]


def test_a_failed_capture_of_updates_continues_without_it(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if device == "cpu":

        def fail(*_: Any) -> Any:
            raise RuntimeError("operation not permitted")

        monkeypatch.setattr(cuda_graph, "_capture_chunk", fail)
    else:
        may_step = StaticStep._may_step

        def reads(self: Any, loss: Any, *args: Any) -> Any:
            loss.item()
            return may_step(self, loss, *args)

        monkeypatch.setattr(StaticStep, "_may_step", reads)
    with caplog.at_level(logging.WARNING, logger="sb3_clipvf"):
        run_both("box", device)
    assert caplog.text.count("The CUDA graph of updates could not be captured") == 1
    # Other graphs are captured.
    policy, buffer = make("box", device)
    engine = CudaGraphEngine(policy, settings_of(policy))
    engine.update(buffer, COEFFICIENTS)
    engine.begin_rollout(buffer)
    engine.act(sample(OBS, device), with_dist_params=True)
    assert engine._failed == {"updates"} and engine._functions.keys() == {"forward"}
    # The generator of the device works, also in a later capture.
    monkeypatch.undo()
    assert th.rand(3, device=device).isfinite().all()
    if device == "cuda":
        run_both("box", device)


# ------------------------------------------------------------------ acting


ACTING = ["discrete", "multi_discrete", "multi_binary", "box", "squashed", "cnn", "cnn, separate", "dict"]


@pytest.mark.parametrize("name", [*ACTING, "gsde", "squashed gsde"])
def test_acting_is_the_policys(name: str, device: str) -> None:
    """Values, log-probabilities of the actions, and distributions are those of the policy."""
    policy, buffer = make(name, device)
    engine = CudaGraphEngine(policy, settings_of(policy))
    engine.begin_rollout(buffer)
    if CASES[name][3].get("use_sde"):
        policy.reset_noise(4)
    seen = []
    for change in (0.0, 0.1):  # a graph reads the numbers of parameters anew
        with th.no_grad():
            for parameter in policy.parameters():
                parameter += change
        obs = sample(policy.observation_space, device)
        acted = engine.act(obs, with_dist_params=True)
        expected = AutogradEngine(policy, settings_of(policy)).act(obs, with_dist_params=True)
        for ours, theirs in zip(acted, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(acted.values, expected.values, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(acted.dist_params, expected.dist_params, rtol=1e-4, atol=1e-5)
        actions = th.as_tensor(acted.actions, device=device)
        with th.no_grad():
            log_prob = policy.evaluate_actions(obs, actions)[1]
            values = engine.predict_values(obs)
        np.testing.assert_allclose(acted.log_prob, log_prob.cpu().numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(values.cpu().numpy(), expected.values, rtol=1e-4, atol=1e-5)
        seen.append(acted.values)
    assert not np.allclose(seen[0], seen[1])


@pytest.mark.parametrize("name", ["discrete", "multi_discrete", "multi_binary", "box", "squashed"])
def test_each_call_draws_new_actions_of_the_policys_distribution(name: str, device: str) -> None:
    policy, buffer = make(name, device)
    engines = [CudaGraphEngine(policy, settings_of(policy)), AutogradEngine(policy, settings_of(policy))]
    engines[0].begin_rollout(buffer)
    row = sample(OBS, device)[:1].expand(2000, -1).contiguous()
    drawn = []
    for engine in engines:
        th.manual_seed(3)
        steps = [engine.act(row, with_dist_params=False).actions.reshape(2000, -1) for _ in range(5)]
        assert not any(np.array_equal(steps[0], other) for other in steps[1:])
        drawn.append(np.concatenate(steps).astype(float))
    spread = drawn[1].std(axis=0) / math.sqrt(len(drawn[1]))
    # Means, and shares of large numbers, differ by at most six standard errors of a difference.
    assert np.all(np.abs(drawn[0].mean(axis=0) - drawn[1].mean(axis=0)) <= 6 * math.sqrt(2) * spread)
    for limit in (-0.5, 0.5, 1.5):
        shares = [(actions > limit).mean(axis=0) for actions in drawn]
        assert np.all(np.abs(shares[0] - shares[1]) <= 6 * math.sqrt(2 * 0.25 / len(drawn[0])))
    th.manual_seed(3)
    assert np.array_equal(engines[0].act(row, with_dist_params=False).actions.reshape(2000, -1), drawn[0][:2000])


def test_callbacks_read_the_distribution_of_the_step(device: str) -> None:
    policy, buffer = make("box", device)
    engine = CudaGraphEngine(policy, settings_of(policy))
    engine.begin_rollout(buffer)
    for factor in (1.0, -1.0):
        acted = engine.act(factor * sample(OBS, device), with_dist_params=True)
        assert acted.dist_params is not None
        loc = policy.action_dist.distribution.loc.cpu().numpy()
        np.testing.assert_allclose(loc, acted.dist_params[:, :2], rtol=1e-6)


# ------------------------------------------------------------------ selection


class CartPole(gym.Env[Any, Any]):
    """Random observations, and episodes of seven steps."""

    observation_space = OBS
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n += 1
        return self._observe(), float(action), False, self.n == 7, {}

    def _observe(self) -> Any:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)


def environments() -> DummyVecEnv:
    return DummyVecEnv([CartPole] * 4)


SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 0}


def test_the_cpu_is_refused() -> None:
    model = ClipPPO("MlpPolicy", environments(), **SMALL, device="cpu", engine="cuda_graph")
    with pytest.raises(ValueError, match="got 'cuda_graph', which cannot: it is on the device cpu"):
        model.learn(64)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
class TestOnAGPU:
    def test_auto_selects_it(self, device: str) -> None:
        policy, buffer = make("cnn", device)
        engine, reason = select_engine("auto", policy, SETTINGS, buffer)
        assert (engine.name, reason) == ("cuda_graph", "it is the fastest for this policy on a GPU")
        assert not is_surpassed(engine, buffer)
        assert is_surpassed(AutogradEngine(policy, SETTINGS), buffer)

    def test_auto_selects_autograd_for_other_policies(self, device: str) -> None:
        policy, buffer = make("box", device)
        policy.mlp_extractor.policy_net.append(th.nn.Dropout())
        engine, reason = select_engine("auto", policy, SETTINGS, buffer)
        assert engine.name == "autograd"
        assert reason.startswith("cuda_graph cannot run the policy: it has a Dropout")

    def test_an_optimizer_that_counts_steps_on_the_device_runs_on_autograd(self, device: str) -> None:
        policy, buffer = make("box", device)
        policy.optimizer = th.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
        assert select_engine("auto", policy, SETTINGS, buffer)[1] == (
            "cuda_graph cannot run the policy: its optimizer keeps the number of steps on the device"
        )

    @pytest.mark.parametrize("policy", ["MlpPolicy", "SquashedMlpPolicy"])
    def test_training_saving_and_loading(self, policy: str, device: str, tmp_path: Path) -> None:
        env = environments()
        if policy == "SquashedMlpPolicy":
            env.action_space = BOX
            for inner in env.envs:
                inner.action_space = BOX
                inner.step = lambda action, inner=inner: CartPole.step(inner, 1.0)
        model = ClipPPO(policy, env, **SMALL, device=device, engine="cuda_graph")
        model.learn(192)
        assert model._engine is not None
        assert model._engine.name == "cuda_graph"
        model.save(tmp_path / "model")
        for other_device, engine in (("cpu", "auto"), (device, "cuda_graph"), (device, "autograd")):
            loaded = ClipPPO.load(tmp_path / "model", env=env, device=other_device, engine=engine)
            for ours, theirs in zip(loaded.policy.parameters(), model.policy.parameters(), strict=True):
                assert th.equal(ours.cpu(), theirs.cpu())
            loaded.learn(128, reset_num_timesteps=False)
            assert {float(s["step"]) for s in loaded.policy.optimizer.state.values()} == {40.0}
            loaded.save(tmp_path / "other")
            ClipPPO.load(tmp_path / "other", env=env, device=device, engine="cuda_graph").learn(64)

    def test_sb3_reads_the_weights_and_trains_on(self, device: str, tmp_path: Path) -> None:
        model = ClipPPO("MlpPolicy", environments(), **SMALL, device=device, engine="cuda_graph").learn(64)
        model.save(tmp_path / "model")
        for name in ("cpu", device):
            theirs = PPO("MlpPolicy", environments(), **SMALL, device=name)
            theirs.set_parameters(tmp_path / "model.zip", device=name)
            theirs.learn(64)

    def test_resuming(self, device: str, tmp_path: Path) -> None:
        """The checkpoint has the generator of the device, so that a resumed training takes the same actions."""
        weights = []
        for parts in ([192], [128, 64]):
            folder = tmp_path / str(len(parts))
            callback = TrainingCheckpoint(64, folder, reset_envs=True)
            model = ClipPPO("MlpPolicy", environments(), **SMALL, device=device, engine="cuda_graph")
            model.learn(192 if len(parts) == 1 else 128, callback=callback, schedule_timesteps=192)
            if len(parts) == 2:
                model = ClipPPO.resume(folder, environments(), device=device)
                model.learn(64, reset_num_timesteps=False, callback=TrainingCheckpoint(64, folder, reset_envs=True))
            assert model.num_timesteps == 192
            weights.append([parameter.detach().cpu() for parameter in model.policy.parameters()])
        for ours, theirs in zip(*weights, strict=True):
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_the_same_seed_repeats_a_training(self, device: str) -> None:
        weights = []
        for _ in range(2):
            model = ClipPPO("MlpPolicy", environments(), **SMALL, device=device, engine="cuda_graph").learn(192)
            weights.append([parameter.detach().cpu() for parameter in model.policy.parameters()])
        assert all(th.equal(*pair) for pair in zip(*weights, strict=True))

    def test_graphs_work_after_autograd_ran_on_another_stream(self, device: str) -> None:
        """Nodes of the parameters remember the stream of an earlier backward pass, whose graph the policy holds."""
        policy, buffer = make("box", device)
        AutogradEngine(policy, settings_of(policy)).update(buffer, COEFFICIENTS)
        held = policy.evaluate_actions(*_batch(buffer))
        engine = CudaGraphEngine(policy, settings_of(policy))
        engine.update(buffer, COEFFICIENTS)
        assert not engine._failed
        assert held[0].requires_grad

    def test_a_capture_draws_nothing(self, device: str) -> None:
        policy, buffer = make("discrete", device)
        engine = CudaGraphEngine(policy, settings_of(policy))
        before = th.cuda.get_rng_state()
        weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        step = StaticEngine._bind(engine, buffer, COEFFICIENTS)
        with unvalidated_distributions:
            cuda_graph._capture_chunk(GraphCapturer(policy.device), step, (6, 4), True)
        assert th.equal(th.cuda.get_rng_state(), before)
        assert all(th.equal(tensor, weights[name]) for name, tensor in policy.state_dict().items())
        assert bool(step.active)
        assert all(not state["exp_avg"].any() for state in policy.optimizer.state.values())


def _batch(buffer: Any) -> tuple[th.Tensor, th.Tensor]:
    batch = next(buffer.in_order(8))
    return batch.observations, batch.actions
