"""The loop over epochs and minibatches, with a scripted update: skips, early stop, statistics of floats and tensors."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_clipvf import ClipPPO
from sb3_clipvf.common import tensors
from sb3_clipvf.common.nonfinite import BadMinibatchError
from sb3_clipvf.engines.epochs import MinibatchStatistics, run_epochs
from sb3_clipvf.engines.interface import UpdateCoefficients, UpdateSettings

NAN = float("nan")
COEFFICIENTS = UpdateCoefficients(clip_range=None, clip_range_vf=None, ent_coef=0.0, vf_coef=0.5, kl_coef=0.0)


class Script:
    """An update whose minibatches have these losses, estimates of the KL and gradient norms, in turn."""

    def __init__(self, losses: Any, kls: Any = (), norms: Any = (), as_tensors: bool = False) -> None:
        n = len(losses)
        self.rows = list(zip(losses, kls or [0.0] * n, norms or [1.0] * n, strict=True))
        self.as_tensors = as_tensors
        self.calls: list[str] = []

    def number(self, value: float) -> Any:
        return th.tensor(value) if self.as_tensors else value

    def loss(self, batch: Any, measure_kl: bool) -> MinibatchStatistics:
        loss, kl, self.norm = self.rows.pop(0)
        self.calls.append("loss")
        terms = [self.number(value) for value in (loss, 2.0, 3.0)]
        return MinibatchStatistics(*terms, None, self.number(loss), self.number(kl), self.number(1.5), None, None)

    def backward(self) -> None:
        self.calls.append("backward")

    def prepare_step(self) -> Any:
        self.calls.append("prepare")
        return self.number(self.norm)

    def step(self) -> None:
        self.calls.append("step")


class Buffer:
    """A rollout of 4 transitions, in the form of SB3's buffers."""

    buffer_size, n_envs = 4, 1
    returns = np.arange(4.0).reshape(4, 1)

    def get(self, batch_size: int) -> Any:
        indices = np.random.permutation(4)
        for start in range(0, 4, batch_size):
            yield SimpleNamespace(returns=th.tensor(self.returns[indices[start : start + batch_size], 0]))


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without float64, as Apple's MPS is: only tensors that were moved to the CPU become float64."""
    to, double = th.Tensor.to, th.Tensor.double
    moved = []

    def to_cpu(tensor: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        result = to(tensor, *args, **kwargs)
        if args and args[0] == th.device("cpu"):
            moved.append(result)
        return result

    def only_moved(tensor: th.Tensor) -> th.Tensor:
        if not any(tensor is each for each in moved):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return double(tensor)

    monkeypatch.setattr(tensors, "_WITHOUT_FLOAT64", ("cpu",))
    monkeypatch.setattr(th.Tensor, "to", to_cpu)
    monkeypatch.setattr(th.Tensor, "double", only_moved)


@pytest.mark.usefixtures("without_float64")
def test_a_device_without_float64() -> None:
    update = Script([1.0] * 4, as_tensors=True)
    statistics = run_epochs(update, settings(), COEFFICIENTS, Buffer()).statistics(th.tensor(0.25))
    numbers = statistics.read()
    assert (numbers["loss"], numbers["value_loss"], numbers["kl_after_update"]) == (1.0, 2.0, 0.25)


@pytest.mark.usefixtures("without_float64")
def test_a_training_on_a_device_without_float64() -> None:
    arguments: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu", "engine": "autograd"}
    model = ClipPPO("MlpPolicy", "CartPole-v1", kl_coef=1.0, adaptive_kl_target=0.01, **arguments)
    model.learn(16)
    assert model.logger.name_to_value["train/kl_after_update"] >= 0


def settings(**changes: Any) -> UpdateSettings:
    common = {"batch_size": 2, "n_epochs": 2, "normalize_advantage": True, "advantage_scope": "minibatch"}
    common |= {"vf_clip": "max", "max_grad_norm": 0.5, "target_kl": None, "measure_kl_after": False}
    common |= {"has_dist_params": False, "discrete_actions": False}
    return UpdateSettings(**{**common, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("as_tensors", [False, True], ids=["floats", "tensors"])
def test_statistics_are_means_over_minibatches_or_over_the_last_epoch(as_tensors: bool) -> None:
    script = Script([1.0, 2.0, 3.0, 6.0], kls=[0.5, 0.5, 1.0, 3.0], norms=[1.0, 2.0, 3.0, 2.0], as_tensors=as_tensors)
    statistics = run_epochs(script, settings(), COEFFICIENTS, Buffer()).statistics(kl_after=th.tensor(0.25))
    assert script.calls == ["loss", "backward", "prepare", "step"] * 4
    assert statistics.read() == {
        "policy_gradient_loss": 3.0, "value_loss": 2.0, "entropy_loss": 3.0, "grad_norm": 2.0, "approx_kl": 2.0,
        "ratio_max": 1.5, "loss": 6.0, "kl_after_update": 0.25,
    }  # fmt: skip
    assert (statistics.n_epochs, statistics.n_skipped, statistics.stopped_at_kl) == (2, 0, None)


def test_target_kl_stops_before_the_step_above_one_and_a_half_times_it() -> None:
    script = Script([1.0] * 4, kls=[0.1, 0.15, 0.16, 0.0])
    record = run_epochs(script, settings(target_kl=0.1), COEFFICIENTS, Buffer())
    assert script.calls == ["loss", "backward", "prepare", "step"] * 2 + ["loss"]
    assert (record.n_epochs, record.stopped_at_kl, len(record.minibatches)) == (2, 0.16, 3)


@pytest.mark.parametrize(
    ("losses", "norms", "what"), [((1.0, NAN), (), "policy_loss"), ((1.0, 1.0), (1.0, NAN), "grad_norm")]
)
def test_a_minibatch_that_is_not_finite_ends_the_update(losses: Any, norms: Any, what: str) -> None:
    script = Script([*losses, 1.0, 1.0], norms=[*norms, 1.0, 1.0] if norms else ())
    np.random.seed(3)
    with pytest.raises(BadMinibatchError) as caught:
        run_epochs(script, settings(), COEFFICIENTS, Buffer())
    assert script.calls.count("step") == 1
    np.random.seed(3)
    assert (caught.value.what, caught.value.epoch, caught.value.minibatch) == (what, 0, 1)
    np.testing.assert_array_equal(caught.value.indices, np.random.permutation(4)[2:])


def test_skipped_minibatches_count_in_no_mean() -> None:
    script = Script([NAN, 2.0, 1e39, -np.inf])
    record = run_epochs(script, settings(on_nonfinite="skip"), COEFFICIENTS, Buffer())
    assert script.calls.count("step") == 1
    numbers = record.statistics(kl_after=None).read()
    assert (numbers["policy_gradient_loss"], numbers["loss"]) == (2.0, 2.0)
    assert np.isnan(numbers["approx_kl"])  # all of the last epoch were skipped
    assert record.n_skipped == 3
    assert record.skipped is not None
    assert record.skipped.minibatch == 0


def test_an_update_that_skips_all_minibatches_raises_the_first() -> None:
    with pytest.raises(BadMinibatchError, match="`policy_loss` must be finite, got nan"):
        run_epochs(Script([NAN, np.inf, NAN, NAN]), settings(on_nonfinite="skip"), COEFFICIENTS, Buffer())


def test_without_checks_all_minibatches_make_steps() -> None:
    script = Script([1.0, NAN, 1.0, 1.0], as_tensors=True)
    record = run_epochs(script, settings(), COEFFICIENTS, Buffer(), checks=False)
    assert script.calls == ["loss", "backward", "prepare", "step"] * 4
    assert not record.is_finite()
