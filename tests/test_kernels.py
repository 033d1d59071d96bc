"""
Kernels alone: exp and tanh, products, losses and KL against their references, the warm-up, the parity tests they name.

That whole updates agree with a straightforward program is in test_engines.py; rollouts are in test_native.py.
"""

import functools
import logging
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_cases
import numpy as np
import pytest
import torch as th
from numba import njit

from sb3_clipvf import objectives
from sb3_clipvf.engines.kernels import entry, losses, minibatch, warmup
from sb3_clipvf.engines.kernels.action_distributions import ActionDist, kl_from_old, normalize_logits
from sb3_clipvf.engines.kernels.elementwise import elu32, exp32, tanh32
from sb3_clipvf.engines.kernels.inputs import BERNOULLI, CATEGORICAL, GAUSSIAN, N_HYPERPARAMETERS, Hyperparameters
from sb3_clipvf.engines.kernels.mlp import weight_gradient
from sb3_clipvf.engines.kernels.totals import STAT

N = 50


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(x))


def leaf(array: np.ndarray) -> th.Tensor:
    return th.tensor(array.astype(np.float64), requires_grad=True)


def assert_close(ours: Any, reference: Any) -> None:
    # Float32 rounding of a few operations on numbers around 1, against double precision.
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)


class TestLosses:
    """Kernels restate objectives.py; gradients are those of torch's autograd."""

    @pytest.mark.parametrize("clip_range", [0.1, np.inf])
    def test_surrogate_loss(self, clip_range: float) -> None:
        log_prob, old_log_prob, advantages = draw(N, scale=0.2), draw(N, seed=1, scale=0.2), draw(N, seed=2)
        log_prob[:5] = old_log_prob[:5]
        gradient = np.empty(N, np.float32)
        loss, clipped, k3, largest = losses.surrogate_loss(log_prob, old_log_prob, advantages, clip_range, N, gradient)
        new = leaf(log_prob)
        log_ratio, ratio = new - leaf(old_log_prob), th.exp(new - leaf(old_log_prob))
        if np.isinf(clip_range):
            expected = -objectives.unclipped_surrogate(ratio, leaf(advantages))
        else:
            expected = -objectives.clipped_surrogate(ratio, leaf(advantages), clip_range)
            assert 0 < clipped < 1
        expected.backward()
        assert_close(loss, expected.item())
        assert_close(gradient, new.grad)
        assert_close(clipped, objectives.clip_fraction(ratio, clip_range).item())
        assert_close(k3, objectives.kl_k3(log_ratio).item())
        assert_close(largest, ratio.max().item())

    @pytest.mark.parametrize(
        ("form", "reference"),
        [
            (losses.NOT_CLIPPED, lambda values, _, returns, __: objectives.value_loss(values, returns)),
            (losses.CLIPPED_MAX, objectives.value_loss_clipped_max),
            (losses.CLIPPED_PREDICTION, objectives.value_loss_clipped_prediction),
        ],
    )
    def test_value_loss(self, form: int, reference: Any) -> None:
        values, old_values, returns = draw(N), draw(N, seed=1), draw(N, seed=2)
        gradient = np.empty(N, np.float32)
        loss, clipped = losses.value_loss(values, old_values, returns, form, 0.5, 0.7, N, gradient)
        new = leaf(values)
        expected = reference(new, leaf(old_values), leaf(returns), 0.5)
        (0.7 * expected).backward()
        assert_close(loss, expected.item())
        assert_close(gradient, new.grad)
        assert clipped == pytest.approx(objectives.vf_clip_fraction(new, leaf(old_values), 0.5).item())
        assert 0 < clipped < 1

    def test_parts_of_a_minibatch_add_up(self) -> None:
        whole, parts = np.zeros(len(STAT)), np.zeros((2, len(STAT)))
        gradients = np.empty((2, N), np.float32)
        values, old_values, returns, hyper = (
            draw(N),
            draw(N, seed=1),
            draw(N, seed=2),
            Hyperparameters(*[0.5] * N_HYPERPARAMETERS),
        )
        minibatch.value_gradient(values, old_values, returns, hyper, N, gradients[0], whole)
        for part, rows in zip(parts, (slice(0, 20), slice(20, N)), strict=True):
            minibatch.value_gradient(values[rows], old_values[rows], returns[rows], hyper, N, gradients[1, rows], part)
        np.testing.assert_array_equal(gradients[0], gradients[1])
        assert whole[STAT.value_loss] > 0
        added = np.full(len(STAT), np.nan)
        minibatch.add_up(parts, added)
        assert_close(added, whole)

    @pytest.mark.parametrize(
        ("parts", "largest"), [((1, 3), 3), ((3, 1), 3), ((np.nan, 1), np.nan), ((1, np.nan), np.nan)]
    )
    def test_the_largest_ratio_of_parts_is_that_of_the_minibatch(self, parts: Any, largest: float) -> None:
        stats, added = np.zeros((2, len(STAT))), np.empty(len(STAT))
        stats[:, STAT.ratio_max] = parts
        minibatch.add_up(stats, added)
        np.testing.assert_equal(added[STAT.ratio_max], largest)

    @pytest.mark.parametrize("n", [1, 2, N])
    def test_normalised_advantages(self, n: int) -> None:
        advantages = draw(n)
        shift, scale = losses.shift_and_scale(advantages, objectives.ADVANTAGE_EPS)
        assert_close((advantages - shift) / scale, objectives.normalize_advantages(th.tensor(advantages)))


def test_exact_kl() -> None:
    """Of the rows that are asked for, in another order."""
    rows = np.random.default_rng(0).permutation(N)
    outputs, old = draw(N, 5), draw(N, 5, seed=1)
    none, logits = np.zeros((0, 0), np.float32), leaf(old)[rows]
    widths = np.array([2, 3])

    def kl(kind: int, log_std: np.ndarray, old: np.ndarray) -> float:
        dist = ActionDist(kind, outputs.copy(), log_std, widths, np.empty_like(outputs))
        normalize_logits(dist)
        return float(kl_from_old(dist, old, rows))

    old_log_probs = th.cat([part.log_softmax(-1) for part in leaf(old).split([2, 3], dim=-1)], dim=-1)
    expected = objectives.multi_categorical_kl(logits, leaf(outputs), [2, 3]).sum().item()
    assert_close(kl(CATEGORICAL, none, old_log_probs.detach().numpy().astype(np.float32)), expected)
    assert_close(kl(BERNOULLI, none, old), objectives.bernoulli_kl(logits, leaf(outputs)).sum().item())
    for log_std in (draw(1, 5, seed=2, scale=0.3), draw(N, 5, seed=2, scale=0.3)):
        old_log_std = draw(N, 5, seed=3, scale=0.3)
        expected = objectives.gaussian_kl(logits, leaf(old_log_std)[rows], leaf(outputs), leaf(log_std)).sum().item()
        assert_close(kl(GAUSSIAN, log_std, np.hstack([old, old_log_std])), expected)


class TestElementwise:
    @pytest.mark.parametrize(
        ("fn", "exact", "low", "high", "ulps"),
        [
            # torch's own are within 1 unit in the last place. A quotient of rounded sums adds up to 2: tanh was 2.46 at
            # most over every third float32, 1.9 near 0.
            (exp32, np.exp, -87.0, 88.7, 1.5),
            (tanh32, np.tanh, -10.0, 10.0, 3.0),
            (tanh32, np.tanh, -1e-3, 1e-3, 2.0),
            (elu32, elu, -20.0, 10.0, 2.0),
            (elu32, elu, -1e-3, 1e-3, 2.0),
        ],
    )
    def test_within_rounding(self, fn: Any, exact: Any, low: float, high: float, ulps: float) -> None:
        x = np.random.default_rng(0).uniform(low, high, 100_000).astype(np.float32)
        expected = exact(x.astype(np.float64))
        error = np.abs(mapped(fn, x) - expected) / np.spacing(np.abs(expected).astype(np.float32))
        assert error.max() <= ulps

    def test_special_numbers(self) -> None:
        x = np.array([np.nan, np.inf, -np.inf, 88.8, -104, 0, -0.0], np.float32)
        np.testing.assert_array_equal(mapped(exp32, x), np.array([np.nan, np.inf, 0, np.inf, 0, 1, 1], np.float32))
        np.testing.assert_array_equal(mapped(tanh32, x), np.array([np.nan, 1, -1, 1, -1, 0, -0.0], np.float32))
        np.testing.assert_array_equal(mapped(elu32, x), np.array([np.nan, np.inf, -1, 88.8, -1, 0, 0], np.float32))


class TestWeightGradient:
    @pytest.mark.parametrize("n", [1, 3, 4, 257])
    @pytest.mark.parametrize(
        ("n_outputs", "n_inputs"), [(1, 64), (2, 64), (16, 64), (17, 64), (64, 1), (64, 8), (64, 9), (3, 3), (1, 1)]
    )
    def test_agrees_with_double_precision(self, n: int, n_outputs: int, n_inputs: int) -> None:
        draw = np.random.default_rng(0).standard_normal
        gradients, inputs = draw((n, n_outputs), np.float32), draw((n, n_inputs), np.float32)
        weight = np.full((n_outputs, n_inputs), np.nan, np.float32)
        exact = gradients.T.astype(np.float64) @ inputs
        for n_times, adds in ((1, False), (2, True)):
            weight_gradient(gradients, inputs, weight, adds)
            # Sums of 257 products of numbers around 1 that cancel out: some 16, to 1e-6 of the largest partial sum.
            np.testing.assert_allclose(weight, n_times * exact, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize(("n_outputs", "n_inputs"), [(2, 4), (32, 4)])
    def test_long_sums_of_one_sign_lose_no_more_than_short_ones(self, n_outputs: int, n_inputs: int) -> None:
        gradients = np.full((2**17, n_outputs), 1.1, np.float32)
        weight = np.empty((n_outputs, n_inputs), np.float32)
        weight_gradient(gradients, np.ones((2**17, n_inputs), np.float32), weight, False)
        # One chain of additions would be off by more than 1e-4.
        np.testing.assert_allclose(weight, 2**17 * float(np.float32(1.1)), rtol=1e-5)


def mapped(fn: Any, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    loop_over(fn)(x, y)
    return y


@functools.cache
def loop_over(fn: Any) -> Any:
    @njit
    def each(x: np.ndarray, y: np.ndarray) -> None:
        for i in range(x.shape[0]):
            y[i] = fn(x[i])

    return each


class TestWarmUp:
    @pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
    def test_training_after_it_compiles_nothing(self) -> None:
        for group in ("native", "kl_of_rollout", "fused"):
            warmup.warm_up(group)
            assert warmup.warm_up(group) == 0
        kernels = (*entry.NATIVE, entry.kl_of_rollout, *entry.FUSED)
        before = [list(kernel.signatures) for kernel in kernels]
        for engine in kernel_cases.ENGINES:
            for actions in ("multi_discrete", "gsde"):
                kernel_cases.digest(engine, actions, "adaptive_kl")
        assert [list(kernel.signatures) for kernel in kernels] == before

    def test_a_long_one_is_announced(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        announced = threading.Event()
        kernel = SimpleNamespace(signatures=[], stats=SimpleNamespace(cache_misses={"one": 1}))
        monkeypatch.setitem(warmup.GROUPS, "slow", ((kernel,), lambda: announced.wait(60)))
        monkeypatch.setattr(warmup, "NOTE_SECONDS", 0.0)
        monkeypatch.setattr(warmup.log, "warning", lambda *message: announced.set())
        with caplog.at_level(logging.INFO, "sb3_clipvf"):
            assert warmup.warm_up("slow") > 0
        assert announced.is_set()
        assert "Compiled the kernels in" in caplog.text


def test_the_parity_tests_that_kernels_name_exist() -> None:
    root, named = Path(__file__).parents[1], []
    for module in Path(entry.__file__).parent.glob("*.py"):
        named += re.findall(r"(tests/\w+\.py)::(\w+)", module.read_text())
    assert len(named) >= 8
    for path, name in named:
        assert re.search(rf"^(class|def) {name}\b", (root / path).read_text(), re.MULTILINE), (path, name)
