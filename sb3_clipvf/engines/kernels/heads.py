"""
Action distributions: log-probabilities, entropies, exact KL, their gradients, and samples.

``outputs`` are what the actor's last layer gives: logits, or means. A categorical kind has one or more categorical
distributions side by side, ``widths`` says how many actions each has. Sums over action dimensions give one number a
row. A Gaussian's ``log_std`` has one row that all states share, or one for each state. The formulas are those of
:mod:`sb3_clipvf.objectives` and torch.distributions.
"""

import math

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.elementwise import exp32
from sb3_clipvf.engines.kernels.memory import BERNOULLI, CATEGORICAL, STATE_DEPENDENT

F = np.float32
_LOG_ROOT_TWO_PI = F(0.5 * math.log(2.0 * math.pi))
_LOWEST = np.finfo(F).min


@fast
def _softplus(x: float) -> float:
    return max(x, F(0)) + np.log1p(exp32(-abs(x)))


@fast
def _sigmoid(x: float) -> float:
    return F(1) / (F(1) + exp32(-x))


@fast
def evaluate(
    kind: int,
    outputs: np.ndarray,
    log_std: np.ndarray,
    widths: np.ndarray,
    actions: np.ndarray,
    probs: np.ndarray,
    log_prob: np.ndarray,
    entropy: np.ndarray,
) -> None:
    """
    Log-probabilities of actions, and entropies.

    :param kind: Of the distribution.
    :param outputs: Shape ``(n, k)``; logits of categorical distributions are normalised in place.
    :param log_std: Of a Gaussian, shape ``(1, k)`` or ``(n, k)``.
    :param widths: Of the categorical distributions.
    :param actions: Shape ``(n, action_dim)``.
    :param probs: Filled with probabilities where the kind has them, shape ``(n, k)``.
    :param log_prob: Filled, shape ``(n,)``, nats.
    :param entropy: Filled, shape ``(n,)``, nats.
    """
    n, k = outputs.shape
    if kind == CATEGORICAL:
        _normalize(outputs, probs, widths)
        for i in range(n):
            total_log_prob, total_entropy = F(0), F(0)
            start = 0
            for head in range(widths.shape[0]):
                total_log_prob += outputs[i, start + int(actions[i, head])]
                start += widths[head]
            for j in range(k):
                total_entropy -= probs[i, j] * outputs[i, j]
            log_prob[i], entropy[i] = total_log_prob, total_entropy
    elif kind == BERNOULLI:
        for i in range(n):
            log_prob[i], entropy[i] = F(0), F(0)
            for j in range(k):
                z = outputs[i, j]
                p, both = _sigmoid(z), _softplus(z)
                probs[i, j] = p
                log_prob[i] += actions[i, j] * z - both
                entropy[i] += both - z * p
    else:
        own = log_std.shape[0] > 1
        constant = _log_scale(log_std[0])
        for i in range(n):
            row = log_std[i if own else 0]
            if own:
                constant = _log_scale(row)
            squares = F(0)
            for j in range(k):
                shift = (actions[i, j] - outputs[i, j]) * exp32(-row[j])
                squares += shift * shift
            log_prob[i] = F(-0.5) * squares - constant
            entropy[i] = constant + F(0.5) * k


@fast
def _log_scale(log_std: np.ndarray) -> float:
    """Minus the log-density of a Gaussian at its mean."""
    total = F(0)
    for j in range(log_std.shape[0]):
        total += log_std[j] + _LOG_ROOT_TWO_PI
    return total


@fast
def _normalize(logits: np.ndarray, probs: np.ndarray, widths: np.ndarray) -> None:
    """Make the logits of categorical distributions log-probabilities, and give their probabilities."""
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
    # Of all rows in one loop, which vector instructions can take.
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
def kl_from_old(
    kind: int, outputs: np.ndarray, log_std: np.ndarray, probs: np.ndarray, old: np.ndarray, rows: np.ndarray
) -> float:
    """
    Sum over rows of the exact KL(pi_old || pi), after :func:`evaluate` or :func:`normalize_all`.

    :param kind: Of the distribution.
    :param outputs: Shape ``(n, k)``.
    :param log_std: Of a Gaussian, shape ``(1, k)`` or ``(n, k)``.
    :param probs: From :func:`evaluate`.
    :param old: Old parameters of the whole rollout, one row a transition.
    :param rows: Which of them, shape ``(n,)``.
    :return: nats, float64.
    """
    n, k = outputs.shape
    total = 0.0
    for i in range(n):
        row = old[rows[i]]
        kl = F(0)
        if kind == CATEGORICAL:
            for j in range(k):
                kl += exp32(row[j]) * (row[j] - outputs[i, j])
        elif kind == BERNOULLI:
            for j in range(k):
                kl += _sigmoid(row[j]) * (row[j] - outputs[i, j]) - _softplus(row[j]) + _softplus(outputs[i, j])
        else:
            spread = log_std[i if log_std.shape[0] > 1 else 0]
            for j in range(k):
                change = spread[j] - row[k + j]
                shift = (row[j] - outputs[i, j]) * exp32(-spread[j])
                kl += change + F(0.5) * (exp32(F(-2) * change) + shift * shift - F(1))
        total += kl
    return total


@fast
def normalize_all(kind: int, outputs: np.ndarray, widths: np.ndarray, probs: np.ndarray) -> None:
    """
    Bring logits into the form that :func:`kl_from_old` and :func:`sample` take.

    :param kind: Of the distribution.
    :param outputs: Shape ``(n, k)``; logits of categorical distributions are normalised in place.
    :param widths: Of the categorical distributions.
    :param probs: Filled with probabilities where the kind is categorical, shape ``(n, k)``.
    """
    if kind == CATEGORICAL:
        _normalize(outputs, probs, widths)


@fast
def gradients(
    kind: int,
    outputs: np.ndarray,
    log_std: np.ndarray,
    widths: np.ndarray,
    actions: np.ndarray,
    probs: np.ndarray,
    log_prob_gradient: np.ndarray,
    ent_coef: float,
    kl_coef: float,
    old: np.ndarray,
    rows: np.ndarray,
    log_std_gradient: np.ndarray,
) -> None:
    """
    Gradients of a minibatch's loss: surrogate, entropy bonus and KL penalty together.

    :param kind: Of the distribution.
    :param outputs: From :func:`evaluate`, shape ``(n, k)``.
    :param log_std: Of a Gaussian, shape ``(1, k)`` or ``(n, k)``.
    :param widths: Of the categorical distributions.
    :param actions: Shape ``(n, action_dim)``.
    :param probs: From :func:`evaluate`; overwritten by the gradient with respect to the outputs.
    :param log_prob_gradient: Of the loss with respect to the log-probabilities, shape ``(n,)``.
    :param ent_coef: Weight of the entropy.
    :param kl_coef: beta, 1/nats.
    :param old: Old parameters of the whole rollout; not read where ``kl_coef`` is 0.
    :param rows: Which of them, shape ``(n,)``.
    :param log_std_gradient: Overwritten, shape of ``log_std``, of a Gaussian.
    """
    n, k = outputs.shape
    ent, beta = F(ent_coef / n), F(kl_coef / n)
    if kind == CATEGORICAL:
        for i in range(n):
            start = 0
            for head in range(widths.shape[0]):
                end = start + widths[head]
                chosen = start + int(actions[i, head])
                _categorical_gradient(outputs, probs, i, start, end, chosen, log_prob_gradient[i], ent)
                start = end
            if kl_coef != 0.0:
                for j in range(k):
                    # The log-probability still stands in `outputs`.
                    probs[i, j] += beta * (exp32(outputs[i, j]) - exp32(old[rows[i], j]))
    elif kind == BERNOULLI:
        for i in range(n):
            for j in range(k):
                p, z = probs[i, j], outputs[i, j]
                gradient = log_prob_gradient[i] * (actions[i, j] - p) + ent * z * p * (F(1) - p)
                if kl_coef != 0.0:
                    gradient += beta * (p - _sigmoid(old[rows[i], j]))
                probs[i, j] = gradient
    else:
        _gaussian_gradients(
            outputs, log_std, actions, probs, log_prob_gradient, ent_coef, beta, old, rows, log_std_gradient
        )


@fast
def _gaussian_gradients(
    outputs: np.ndarray, log_std: np.ndarray, actions: np.ndarray, mean_gradient: np.ndarray,
    log_prob_gradient: np.ndarray, ent_coef: float, beta: float, old: np.ndarray, rows: np.ndarray,
    log_std_gradient: np.ndarray,
) -> None:  # fmt: skip
    """Overwrite both gradients; each entry of ``log_std`` has its share of the mean entropy's."""
    n, k = outputs.shape
    own = log_std.shape[0] > 1
    log_std_gradient[:] = F(-ent_coef / log_std.shape[0])
    for i in range(n):
        row, row_gradient = log_std[i if own else 0], log_std_gradient[i if own else 0]
        for j in range(k):
            precision = exp32(F(-2) * row[j])
            shift = actions[i, j] - outputs[i, j]
            scaled = shift * precision
            gradient = log_prob_gradient[i] * scaled
            spread = log_prob_gradient[i] * (shift * scaled - F(1))
            if beta != F(0):
                moved = outputs[i, j] - old[rows[i], j]
                old_variance = exp32(F(2) * old[rows[i], k + j])
                gradient += beta * moved * precision
                spread += beta * (F(1) - (old_variance + moved * moved) * precision)
            mean_gradient[i, j] = gradient
            row_gradient[j] += spread


@fast
def _categorical_gradient(
    log_probs: np.ndarray, probs: np.ndarray, i: int, start: int, end: int, chosen: int, weight: float, ent: float
) -> None:
    """Overwrite the probabilities of one categorical distribution in row i by the gradient of its logits."""
    entropy = F(0)
    for j in range(start, end):
        entropy -= probs[i, j] * log_probs[i, j]
    for j in range(start, end):
        p = probs[i, j]
        probs[i, j] = ent * p * (log_probs[i, j] + entropy) - weight * p
    probs[i, chosen] += weight


@fast
def sample(
    kind: int,
    outputs: np.ndarray,
    log_std: np.ndarray,
    widths: np.ndarray,
    probs: np.ndarray,
    noise: np.ndarray,
    actions: np.ndarray,
) -> None:
    """
    Draw one action a row.

    :param kind: Of the distribution.
    :param outputs: After :func:`normalize_all`, shape ``(n, k)``.
    :param log_std: Of a Gaussian, shape ``(1, k)`` or ``(n, k)``.
    :param widths: Of the categorical distributions.
    :param probs: From :func:`normalize_all`.
    :param noise: What torch's own distributions draw: for categorical distributions exponential, shape ``(n, k)``; else
        of shape ``(n, action_dim)``, uniform in [0, 1) for bits, standard normal for a Gaussian, and what is added to
        the means where its spread depends on the state.
    :param actions: Filled, shape ``(n, action_dim)``.
    """
    n, k = outputs.shape
    for i in range(n):
        if kind == CATEGORICAL:
            start = 0
            for head in range(widths.shape[0]):
                actions[i, head] = _draw(probs, noise, i, start, start + widths[head])
                start += widths[head]
        elif kind == BERNOULLI:
            for j in range(k):
                actions[i, j] = F(1) if noise[i, j] < _sigmoid(outputs[i, j]) else F(0)
        elif kind == STATE_DEPENDENT:
            for j in range(k):
                actions[i, j] = outputs[i, j] + noise[i, j]
        else:
            for j in range(k):
                actions[i, j] = outputs[i, j] + exp32(log_std[0, j]) * noise[i, j]


@fast
def _draw(probs: np.ndarray, exponentials: np.ndarray, i: int, start: int, end: int) -> float:
    """Index of one categorical distribution in row i: the largest p / e with e ~ Exp(1), as torch.multinomial draws."""
    chosen, largest = 0, F(-1)
    for j in range(start, end):
        score = probs[i, j] / exponentials[i, j]
        if score > largest:
            chosen, largest = j - start, score
    return F(chosen)
