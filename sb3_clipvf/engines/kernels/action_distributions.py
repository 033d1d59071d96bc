"""
Action distributions: log-probabilities, entropies, exact KL, their gradients, and samples.

A categorical kind has one or more categorical distributions side by side. Sums over action dimensions give one number
per state. They restate torch.distributions and, of :mod:`sb3_clipvf.objectives`, ``multi_categorical_kl``,
``bernoulli_kl`` and ``gaussian_kl``. Parity tests: ``tests/test_kernels.py::test_exact_kl``;
``tests/test_engines.py::TestContract``, with a policy of each kind; for samples, ``tests/test_native.py::TestActing``.
"""

import math
from typing import NamedTuple

import numpy as np

from sb3_clipvf.common.jit import fast, fast_alone
from sb3_clipvf.engines.kernels import gsde
from sb3_clipvf.engines.kernels.elementwise import exp32
from sb3_clipvf.engines.kernels.inputs import BERNOULLI, CATEGORICAL, GAUSSIAN, STATE_DEPENDENT, Policy
from sb3_clipvf.engines.kernels.memory import PARAM, matrix
from sb3_clipvf.engines.kernels.mlp import forward, output_gradient

F = np.float32
_LOG_ROOT_TWO_PI = F(0.5 * math.log(2.0 * math.pi))
_LOWEST = np.finfo(F).min


class ActionDist(NamedTuple):
    """The action distributions of ``n`` states."""

    kind: int
    outputs: np.ndarray  # of the actor's last layer, logits or means, (n, k)
    log_std: np.ndarray  # of a Gaussian: (1, k) if all states share it, else (n, k); empty for other kinds
    widths: np.ndarray  # number of actions of each categorical distribution
    probs: np.ndarray  # (n, k), room for probabilities, which `gradients` overwrites


@fast
def distributions_of(policy: Policy, workspace: np.ndarray, n: int) -> ActionDist:
    """Run the actor on the ``n`` observations in its workspace, and return the distributions, in the workspace."""
    outputs = forward(policy.actor, workspace, n)
    if policy.kind == STATE_DEPENDENT:
        log_std = gsde.log_stds(policy, workspace, n)
    else:
        log_std = shared_log_std(policy, PARAM)
    return ActionDist(policy.kind, outputs, log_std, policy.widths, output_gradient(policy.actor, workspace, n))


@fast
def shared_log_std(policy: Policy, column: int) -> np.ndarray:
    """Return a Gaussian's ``log_std`` or, by the column of the table, its gradient, ``(1, k)``, no copy; else empty."""
    if policy.kind != GAUSSIAN:
        return np.empty((0, 0), np.float32)
    return matrix(policy.actor.table[-1, column], 1, policy.actor.sizes[-1])


@fast
def evaluate(dist: ActionDist, actions: np.ndarray, log_prob: np.ndarray, entropy: np.ndarray) -> None:
    """
    Fill log-probabilities of actions, ``(n, action_dim)``, and entropies, both ``(n,)`` in nats.

    Logits of categorical distributions are normalised in place, and ``probs`` are filled if the kind has them.
    """
    outputs, probs, widths = dist.outputs, dist.probs, dist.widths
    n, k = outputs.shape
    if dist.kind == CATEGORICAL:
        normalize_logits(dist)
        for i in range(n):
            total_log_prob, total_entropy = F(0), F(0)
            start = 0
            for head in range(widths.shape[0]):
                total_log_prob += outputs[i, start + int(actions[i, head])]
                start += widths[head]
            for j in range(k):
                total_entropy -= probs[i, j] * outputs[i, j]
            log_prob[i], entropy[i] = total_log_prob, total_entropy
    elif dist.kind == BERNOULLI:
        for i in range(n):
            log_prob[i], entropy[i] = F(0), F(0)
            for j in range(k):
                z = outputs[i, j]
                p, both = _sigmoid(z), _softplus(z)
                probs[i, j] = p
                log_prob[i] += actions[i, j] * z - both
                entropy[i] += both - z * p
    else:
        own = dist.log_std.shape[0] > 1
        constant = _log_scale(dist.log_std[0])
        for i in range(n):
            row = dist.log_std[i if own else 0]
            if own:
                constant = _log_scale(row)
            squares = F(0)
            for j in range(k):
                shift = (actions[i, j] - outputs[i, j]) * exp32(-row[j])
                squares += shift * shift
            log_prob[i] = F(-0.5) * squares - constant
            entropy[i] = constant + F(0.5) * k


@fast
def normalize_logits(dist: ActionDist) -> None:
    """Convert logits of categorical distributions to log-probabilities, in place, and fill ``probs``; skip others."""
    if dist.kind != CATEGORICAL:
        return
    logits, probs, widths = dist.outputs, dist.probs, dist.widths
    n = logits.shape[0]
    for i in range(n):
        start = 0
        for head in range(widths.shape[0]):
            end = start + widths[head]
            largest = logits[i, start]
            for j in range(start + 1, end):
                largest = max(largest, logits[i, j])
            for j in range(start, end):
                logits[i, j] -= largest
            start = end
    # One loop over all rows, which LLVM can turn into vector instructions.
    shifted, exponentials = logits.reshape(logits.size), probs.reshape(probs.size)
    for k in range(shifted.shape[0]):
        exponentials[k] = exp32(shifted[k])
    for i in range(n):
        start = 0
        for head in range(widths.shape[0]):
            end = start + widths[head]
            total = F(0)
            for j in range(start, end):
                total += probs[i, j]
            shift, inverse = np.log(total), F(1) / total
            for j in range(start, end):
                # An action that is masked by -inf keeps its probability 0; 0 times -inf would be NaN.
                log_prob = logits[i, j] - shift
                logits[i, j] = _LOWEST if log_prob < _LOWEST else log_prob
                probs[i, j] *= inverse
            start = end


@fast
def kl_from_old(dist: ActionDist, old: np.ndarray, rows: np.ndarray) -> float:
    """
    Return the sum over states of the exact KL(pi_old || pi), nats, float64; logits must be normalised.

    ``old`` holds the old distributions' parameters, and ``rows``, shape ``(n,)``, the states' rows in it.
    """
    outputs, log_std = dist.outputs, dist.log_std
    n, k = outputs.shape
    total = 0.0
    for i in range(n):
        row = old[rows[i]]
        kl = F(0)
        if dist.kind == CATEGORICAL:
            for j in range(k):
                kl += exp32(row[j]) * (row[j] - outputs[i, j])
        elif dist.kind == BERNOULLI:
            for j in range(k):
                kl += _sigmoid(row[j]) * (row[j] - outputs[i, j]) - _softplus(row[j]) + _softplus(outputs[i, j])
        else:
            new = log_std[i if log_std.shape[0] > 1 else 0]
            for j in range(k):
                change = new[j] - row[k + j]
                shift = (row[j] - outputs[i, j]) * exp32(-new[j])
                kl += change + F(0.5) * (exp32(F(-2) * change) + shift * shift - F(1))
        total += kl
    return total


@fast
def gradients(
    dist: ActionDist, actions: np.ndarray, log_prob_gradient: np.ndarray, ent_coef: float, kl_coef: float,
    old: np.ndarray, rows: np.ndarray, n: int, log_std_gradient: np.ndarray,
) -> None:  # fmt: skip
    """
    Overwrite ``probs`` with the loss's gradient (surrogate, entropy bonus, KL penalty) with respect to the outputs.

    Entropy and KL are means over the ``n`` rows of a minibatch, of which these are some or all. ``log_prob_gradient``,
    one number per row, is the surrogate loss's. A Gaussian's gradient is added to ``log_std_gradient``. ``old`` and
    ``rows`` are those of :func:`kl_from_old`, not read if ``kl_coef`` is 0.
    """
    outputs, probs = dist.outputs, dist.probs
    n_rows, k = outputs.shape
    ent, beta = F(ent_coef / n), F(kl_coef / n)
    if dist.kind == CATEGORICAL:
        for i in range(n_rows):
            start = 0
            for head in range(dist.widths.shape[0]):
                end = start + dist.widths[head]
                chosen = start + int(actions[i, head])
                _categorical_gradient(outputs, probs, i, start, end, chosen, log_prob_gradient[i], ent)
                start = end
            if kl_coef != 0.0:
                for j in range(k):
                    # The log-probability still stands in `outputs`.
                    probs[i, j] += beta * (exp32(outputs[i, j]) - exp32(old[rows[i], j]))
    elif dist.kind == BERNOULLI:
        for i in range(n_rows):
            for j in range(k):
                p, z = probs[i, j], outputs[i, j]
                gradient = log_prob_gradient[i] * (actions[i, j] - p) + ent * z * p * (F(1) - p)
                if kl_coef != 0.0:
                    gradient += beta * (p - _sigmoid(old[rows[i], j]))
                probs[i, j] = gradient
    else:
        _gaussian_gradients(dist, actions, log_prob_gradient, ent, beta, old, rows, log_std_gradient)


@fast
def sample(dist: ActionDist, noise: np.ndarray, actions: np.ndarray) -> None:
    """
    Fill ``actions``, shape ``(n, action_dim)``, with a sample of each distribution; logits must be normalised.

    ``noise`` is what torch's own distributions draw: exponential, ``(n, k)``, for categorical distributions; uniform in
    [0, 1) for bits; standard normal for a Gaussian. For gSDE it is what is added to the means.
    """
    outputs, widths = dist.outputs, dist.widths
    n, k = outputs.shape
    for i in range(n):
        if dist.kind == CATEGORICAL:
            start = 0
            for head in range(widths.shape[0]):
                actions[i, head] = _draw(dist.probs, noise, i, start, start + widths[head])
                start += widths[head]
        elif dist.kind == BERNOULLI:
            for j in range(k):
                actions[i, j] = F(1) if noise[i, j] < _sigmoid(outputs[i, j]) else F(0)
        elif dist.kind == STATE_DEPENDENT:
            for j in range(k):
                actions[i, j] = outputs[i, j] + noise[i, j]
        else:
            for j in range(k):
                actions[i, j] = outputs[i, j] + exp32(dist.log_std[0, j]) * noise[i, j]


@fast
def _softplus(x: float) -> float:
    return max(x, F(0)) + np.log1p(exp32(-abs(x)))


@fast
def _sigmoid(x: float) -> float:
    return F(1) / (F(1) + exp32(-x))


@fast
def _log_scale(log_std: np.ndarray) -> float:
    """Return minus the log-density of a Gaussian at its mean."""
    total = F(0)
    for j in range(log_std.shape[0]):
        total += log_std[j] + _LOG_ROOT_TWO_PI
    return total


@fast
def _categorical_gradient(
    log_probs: np.ndarray, probs: np.ndarray, i: int, start: int, end: int, chosen: int, weight: float, ent: float
) -> None:
    """Overwrite the probabilities of one categorical distribution in row ``i`` with the gradient of its logits."""
    entropy = F(0)
    for j in range(start, end):
        entropy -= probs[i, j] * log_probs[i, j]
    for j in range(start, end):
        p = probs[i, j]
        probs[i, j] = ent * p * (log_probs[i, j] + entropy) - weight * p
    probs[i, chosen] += weight


@fast_alone
def _gaussian_gradients(
    dist: ActionDist, actions: np.ndarray, log_prob_gradient: np.ndarray, ent: float, beta: float,
    old: np.ndarray, rows: np.ndarray, log_std_gradient: np.ndarray,
) -> None:  # fmt: skip
    """Overwrite the gradient of the means, and add that of ``log_std``; ``ent`` is the entropy's weight per row."""
    outputs, log_std = dist.outputs, dist.log_std
    n, k = outputs.shape
    own = log_std.shape[0] > 1
    entropy_gradient = -ent if own else -ent * F(n)
    for i in range(log_std_gradient.shape[0]):
        for j in range(k):
            log_std_gradient[i, j] += entropy_gradient
    for i in range(n):
        row, row_gradient = log_std[i if own else 0], log_std_gradient[i if own else 0]
        for j in range(k):
            precision = exp32(F(-2) * row[j])
            shift = actions[i, j] - outputs[i, j]
            scaled = shift * precision
            of_mean = log_prob_gradient[i] * scaled
            of_log_std = log_prob_gradient[i] * (shift * scaled - F(1))
            if beta != F(0):
                moved = outputs[i, j] - old[rows[i], j]
                old_variance = exp32(F(2) * old[rows[i], k + j])
                of_mean += beta * moved * precision
                of_log_std += beta * (F(1) - (old_variance + moved * moved) * precision)
            dist.probs[i, j] = of_mean
            row_gradient[j] += of_log_std


@fast
def _draw(probs: np.ndarray, exponentials: np.ndarray, i: int, start: int, end: int) -> float:
    """Return the index of the largest p / e with e ~ Exp(1), by which torch.multinomial draws from a categorical."""
    chosen, largest = 0, F(-1)
    for j in range(start, end):
        score = probs[i, j] / exponentials[i, j]
        if score > largest:
            chosen, largest = j - start, score
    return F(chosen)
