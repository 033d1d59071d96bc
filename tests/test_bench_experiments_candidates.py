"""Changes of the algorithm that suites try: each equals the plain algorithm when neutral, and does what it says."""

from typing import Any

import numpy as np
import pytest
import torch as th
from rl_zoo3.utils import get_class_by_name
from stable_baselines3.common.env_util import make_vec_env

from sb3_clipvf import ClipPPO
from sb3_clipvf.engines.interface import UpdateCoefficients
from sb3_clipvf.rollout import gae
from sb3_clipvf.zoo.entries import ZOO_KEYS, with_arguments
from tests.bench.experiments.candidates import (
    AdamRestart,
    CentredRange,
    CriticErrorRange,
    OuterStep,
    RecomputedAdvantages,
    TwoLambdaBuffer,
    UpdateCallback,
    ValueNormalization,
    predicted_values,
)
from tests.bench.experiments.suite_file import read_suite

ENGINES = ("native", "autograd")
N_STEPS = 64


def trained(*callbacks: UpdateCallback, n_updates: int = 3, **changes: Any) -> ClipPPO:
    """A model after some updates of two CartPoles."""
    settings = {"n_steps": N_STEPS, "batch_size": 32, "n_epochs": 3, "learning_rate": 1e-3, "device": "cpu"} | changes
    model = ClipPPO("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), seed=0, **settings)
    return model.learn(n_updates * 2 * N_STEPS, callback=list(callbacks))


def weights(model: ClipPPO) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


class Neutral(ValueNormalization):
    @staticmethod
    def _mean_std(returns: np.ndarray) -> tuple[float, float]:
        return 0.0, 1.0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("callback", "changes"),
    [
        (AdamRestart(), {"n_updates": 1}),
        (Neutral(), {}),
        (RecomputedAdvantages(), {"n_epochs": 1}),
        (OuterStep(1.0), {}),
        (None, {"rollout_buffer_class": TwoLambdaBuffer, "rollout_buffer_kwargs": {"value_lambda": 0.95}}),
    ],
    ids=["restart", "normalization", "recomputed", "outer", "lambdas"],
)
def test_neutral_candidates_give_the_weights_of_the_plain_algorithm(
    engine: str, callback: Any, changes: dict[str, Any]
) -> None:
    callbacks = [] if callback is None else [callback]
    plain = {name: changes[name] for name in ("n_epochs", "n_updates") if name in changes}
    model = trained(*callbacks, engine=engine, **changes)
    assert model._engine is not None
    assert model._engine.name == engine
    assert th.equal(weights(model), weights(trained(engine=engine, **plain)))


@pytest.mark.parametrize(
    "callback", [AdamRestart(), ValueNormalization(), RecomputedAdvantages(), OuterStep(1.5), CriticErrorRange(0.1)]
)
def test_callbacks_change_the_training_in_the_same_way_on_both_engines(callback: UpdateCallback) -> None:
    native = trained(callback, engine="native")
    assert not th.allclose(weights(native), weights(trained(engine="native")), atol=1e-4)
    assert th.allclose(weights(native), weights(trained(callback, engine="autograd")), atol=2e-5)


def test_auto_selects_the_native_engine_with_all_candidates() -> None:
    callbacks = [AdamRestart(), ValueNormalization(), RecomputedAdvantages(), OuterStep(1.5), CriticErrorRange(2.0)]
    buffer = {"rollout_buffer_class": TwoLambdaBuffer, "rollout_buffer_kwargs": {"value_lambda": 1.0}}
    model = trained(*callbacks, n_updates=1, **buffer)
    assert model._engine_choice[1:] == ("native", "it is the fastest for this policy")


class Recorder(UpdateCallback):
    """Keeps what the update inside of a candidate gets."""

    def update(self, inner: Any, buffer: Any, coefficients: UpdateCoefficients) -> Any:
        self.model.seen.append(  # type: ignore[attr-defined]
            {
                "n_steps": {int(state["step"]) for state in self.model.policy.optimizer.state.values()},
                "advantages": buffer.advantages.copy(),
                "returns": buffer.returns.copy(),
                "old_values": buffer.values.copy(),
                "values": predicted_values(self.engine, buffer),
                "weights": weights(self.model),
                "clip_range_vf": coefficients.clip_range_vf,
            }
        )
        statistics = inner(buffer, coefficients)
        self.model.seen[-1]["values_after"] = predicted_values(self.engine, buffer)  # type: ignore[attr-defined]
        return statistics


def observed(callback: UpdateCallback, **changes: Any) -> tuple[ClipPPO, list[dict[str, Any]]]:
    """A model, and what each update inside of a candidate got."""
    model = trained(n_updates=1, **changes)
    model.seen = []  # type: ignore[attr-defined]
    model.learn(3 * 2 * N_STEPS, callback=[Recorder(), callback])
    return model, model.seen  # type: ignore[attr-defined]


def test_restart_sets_the_number_of_steps_to_zero_and_keeps_moments() -> None:
    model, seen = observed(AdamRestart())
    assert [one["n_steps"] for one in seen] == [{0}, {0}, {0}]
    states = list(model.policy.optimizer.state.values())
    assert {int(state["step"]) for state in states} == {3 * 4}  # epochs x minibatches of the last update
    assert all(bool(state["exp_avg_sq"].any()) for state in states)


def test_critic_learns_returns_of_mean_0_and_standard_deviation_1_and_predicts_return_units() -> None:
    model, seen = observed(ValueNormalization(), clip_range_vf=2.0)
    for one in seen:
        assert one["returns"].mean() == pytest.approx(0, abs=1e-5)
        assert one["returns"].std() == pytest.approx(1, abs=1e-5)
        # The rescaled critic has the rollout's values, in normalised units.
        np.testing.assert_allclose(one["values"], one["old_values"], atol=1e-4)
        assert one["clip_range_vf"] == pytest.approx(2.0, rel=1e-4)  # standard deviations
    # After the update, rollout and critic are in return units again.
    buffer, last = model.rollout_buffer, seen[-1]
    mean, std = buffer.returns.mean(), buffer.returns.std()
    np.testing.assert_allclose(buffer.values, mean + std * last["old_values"], atol=1e-4)
    np.testing.assert_allclose(predicted_values(model._engine, buffer), mean + std * last["values_after"], atol=1e-4)
    assert std > 1.5


def test_normalization_of_constant_returns_divides_by_no_zero() -> None:
    for returns in (np.zeros((4, 2), np.float32), np.full((4, 2), 7.0, np.float32)):
        mean, std = ValueNormalization._mean_std(returns)
        assert mean == returns[0, 0]
        assert std == max(1e-3 * mean, 0.0) or std == 1.0


def test_advantages_are_computed_from_present_values_in_each_epoch() -> None:
    model, seen = observed(RecomputedAdvantages())
    assert len(seen) == 3 * 3
    for first, *later in (seen[0:3], seen[3:6], seen[6:9]):
        np.testing.assert_array_equal(first["advantages"] + first["old_values"], first["returns"])
        np.testing.assert_allclose(first["values"], first["old_values"], atol=1e-5)
        for one in later:
            np.testing.assert_array_equal(one["old_values"], first["old_values"])
            np.testing.assert_allclose(one["returns"] - one["advantages"], one["values"], atol=1e-4)
            assert np.abs(one["advantages"] - first["advantages"]).max() > 1e-3
    buffer = model.rollout_buffer
    np.testing.assert_array_equal(buffer.advantages, seen[6]["advantages"])
    assert model._n_updates == 3 + 9  # epochs, also those of the first training


def test_recomputed_advantages_are_those_of_gae() -> None:
    model, seen = observed(RecomputedAdvantages())
    buffer, last = model.rollout_buffer, seen[-1]
    starts, dones = buffer.episode_starts, model._last_episode_starts
    # The values after the second epoch are known for the rollout, and the advantage of the last step gives the last.
    step = last["advantages"][-1] - (buffer.rewards[-1] - last["values"][-1])
    last_values = np.where(dones, 0.0, step / model.gamma).astype(np.float32)
    advantages, _ = gae(buffer.rewards, last["values"], starts, last_values, dones, model.gamma, model.gae_lambda)
    np.testing.assert_allclose(advantages, last["advantages"], atol=1e-3)


def test_outer_step_extends_the_change_of_an_update() -> None:
    model = trained(n_updates=1)
    model.seen = []  # type: ignore[attr-defined]
    model.learn(2 * N_STEPS, callback=[After(), OuterStep(1.5)])
    before, after = model.seen  # type: ignore[attr-defined]
    assert (after - before).abs().max() > 1e-3
    th.testing.assert_close(weights(model), before + 1.5 * (after - before))


class After(UpdateCallback):
    """Keeps the weights before and after the update inside of a candidate."""

    def update(self, inner: Any, buffer: Any, coefficients: UpdateCoefficients) -> Any:
        before = weights(self.model).clone()
        statistics = inner(buffer, coefficients)
        self.model.seen += [before, weights(self.model).clone()]  # type: ignore[attr-defined]
        return statistics


def test_range_is_a_multiple_of_the_error_of_the_critic() -> None:
    _, seen = observed(CriticErrorRange(2.5), clip_range_vf=None)
    for one in seen:
        error = np.sqrt(np.mean((one["returns"] - one["old_values"]) ** 2))
        assert one["clip_range_vf"] == pytest.approx(2.5 * error)
    # A range that no value reaches is the plain loss up to rounding.
    wide, plain = trained(CriticErrorRange(1e3)), trained()
    assert th.allclose(weights(wide), weights(plain), atol=2e-5)


def test_centred_range_does_not_limit_a_change_of_all_values() -> None:
    model, seen = observed(CentredRange(), clip_range_vf=1.0)
    for one in seen:
        assert (one["returns"] - one["old_values"]).mean() == pytest.approx(0, abs=1e-4)
        assert np.abs(one["values"] - one["old_values"]).mean() > 1  # the mean error of an untrained critic
    # The model's own values are those of the rollout again.
    assert np.abs(model.rollout_buffer.values - seen[-1]["old_values"]).mean() > 1
    assert th.equal(weights(trained(CentredRange())), weights(trained()))  # without a clip, nothing reads them


@pytest.mark.parametrize("name", ["beyond", "value-clip-forms"])
def test_all_settings_run_on_the_native_engine(name: str) -> None:
    suite = read_suite(name)
    environments = {one.env_id: one for one in suite.environments}
    for env_id in ("Pendulum-v1", "HalfCheetah-v5"):
        environment = environments[env_id]
        for setting in suite.settings_of(environment):
            settings = {**environment.settings, **suite.settings[setting].changes}  # type: ignore[dict-item]
            for callback in settings.pop("callback", []):
                ((dotted, kwargs),) = with_arguments(callback)
                assert isinstance(get_class_by_name(dotted)(**kwargs), UpdateCallback)
            if "rollout_buffer_class" in settings:
                settings["rollout_buffer_class"] = get_class_by_name(settings["rollout_buffer_class"])
            settings["policy_kwargs"] = eval(settings.get("policy_kwargs", "{}"))
            arguments = {key: value for key, value in settings.items() if key not in ZOO_KEYS}
            model = ClipPPO("MlpPolicy", env_id, device="cpu", **arguments)
            assert model._current_engine().name == "native", setting


def test_returns_have_their_own_lambda() -> None:
    kwargs = {"value_lambda": 1.0}
    model = trained(n_updates=1, rollout_buffer_class=TwoLambdaBuffer, rollout_buffer_kwargs=kwargs, gae_lambda=0.5)
    buffer = model.rollout_buffer
    arrays = (buffer.rewards, buffer.values, buffer.episode_starts)
    # The critic has made an update since: the values after the last step come from the advantages.
    dones, gamma = model._last_episode_starts, model.gamma
    step = buffer.advantages[-1] - (buffer.rewards[-1] - buffer.values[-1])
    last_values = np.where(dones, 0.0, step / gamma).astype(np.float32)
    advantages, _ = gae(*arrays, last_values, dones, gamma, 0.5)
    _, returns = gae(*arrays, last_values, dones, gamma, 1.0)
    np.testing.assert_allclose(buffer.advantages, advantages, atol=1e-4)
    np.testing.assert_allclose(buffer.returns, returns, atol=1e-4)
    assert np.abs(buffer.returns - buffer.advantages - buffer.values).max() > 0.1
