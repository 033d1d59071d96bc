"""
The mathematics of PPO's update: pure functions of tensors.

An *objective* is maximised, a *loss* is minimised. ``ratio`` is pi(a|s) / pi_old(a|s), where pi_old is the policy that
collected the rollout. All functions are differentiable.

ClipPPO's arguments choose among them in ``engines/autograd.py``. ``engines/kernels/losses.py`` restates them, compiled.

Notation and equation numbers follow Schulman et al. 2017, arXiv 1707.06347, unless stated otherwise.
"""

import torch as th
from torch.nn import functional as F

ADVANTAGE_EPS = 1e-8
"""Added to the standard deviation of the advantages, as in SB3 and OpenAI baselines."""


def normalize_advantages(advantages: th.Tensor) -> th.Tensor:
    """
    Shift and scale advantages to mean 0 and (unbiased) standard deviation 1.

    :param advantages: Shape ``(n,)``.
    :return: Shape ``(n,)``. A single advantage has no spread and is returned unchanged.
    """
    if len(advantages) <= 1:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + ADVANTAGE_EPS)


def unclipped_surrogate(ratio: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    """
    The conservative policy iteration objective: ``E[ratio * A]``.

    :param ratio: Probability ratios, shape ``(n,)``, positive.
    :param advantages: Advantage estimates, shape ``(n,)``.
    :return: Scalar objective.
    Source: equation 6.
    """
    return (advantages * ratio).mean()


def clipped_surrogate(ratio: th.Tensor, advantages: th.Tensor, clip_range: float) -> th.Tensor:
    """
    The clipped objective: ``E[min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)]``.

    :param ratio: Probability ratios, shape ``(n,)``, positive.
    :param advantages: Advantage estimates, shape ``(n,)``.
    :param clip_range: epsilon, at least 0.
    :return: Scalar objective.
    Source: equation 7.
    """
    unclipped = advantages * ratio
    clipped = advantages * th.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return th.min(unclipped, clipped).mean()


def clip_fraction(ratio: th.Tensor, clip_range: float) -> th.Tensor:
    """
    Fraction of ratios outside ``[1 - eps, 1 + eps]``.

    :param ratio: Probability ratios, shape ``(n,)``.
    :param clip_range: epsilon, at least 0.
    :return: Scalar in [0, 1].
    """
    return th.mean((th.abs(ratio - 1) > clip_range).float())


def kl_k3(log_ratio: th.Tensor) -> th.Tensor:
    """
    Sampled estimate of KL(pi_old || pi): ``E[(ratio - 1) - log ratio]``; unbiased, never negative.

    SB3 logs it as ``train/approx_kl``.

    :param log_ratio: log pi(a|s) - log pi_old(a|s) of actions drawn from pi_old, shape ``(n,)``, nats.
    :return: Scalar, nats.
    Source: Schulman 2020, "Approximating KL divergence" (blog), estimator k3.
    """
    return th.mean((th.exp(log_ratio) - 1) - log_ratio)


def categorical_kl(old_logits: th.Tensor, logits: th.Tensor) -> th.Tensor:
    """
    Exact KL(old || new) of two categorical distributions: ``sum_i p_i (log p_i - log q_i)``.

    :param old_logits: Unnormalised log-probabilities of the old distribution, shape ``(..., n_actions)``.
    :param logits: The same for the new distribution.
    :return: Shape ``(...)``, nats.
    """
    old_log_p = th.log_softmax(old_logits, dim=-1)
    log_p = th.log_softmax(logits, dim=-1)
    # A masked action (log-probability -inf) contributes 0; -inf minus -inf would be NaN.
    terms = th.where(old_log_p == -th.inf, 0.0, old_log_p.exp() * (old_log_p - log_p))
    return terms.sum(dim=-1)


def multi_categorical_kl(old_logits: th.Tensor, logits: th.Tensor, n_actions: list[int]) -> th.Tensor:
    """
    Exact KL(old || new) of independent categorical distributions: the sum over them.

    :param old_logits: Concatenated logits of the old distributions, shape ``(n, sum(n_actions))``.
    :param logits: The same for the new distributions.
    :param n_actions: Number of actions of each distribution.
    :return: Shape ``(n,)``, nats.
    """
    pairs = zip(th.split(old_logits, n_actions, dim=-1), th.split(logits, n_actions, dim=-1), strict=True)
    return th.stack([categorical_kl(old, new) for old, new in pairs]).sum(dim=0)


def bernoulli_kl(old_logits: th.Tensor, logits: th.Tensor) -> th.Tensor:
    """
    Exact KL(old || new) of independent Bernoulli distributions: the sum over them.

    :param old_logits: Log-odds of a one under the old distributions, shape ``(n, n_bits)``.
    :param logits: The same for the new distributions.
    :return: Shape ``(n,)``, nats.
    """
    old_p = th.sigmoid(old_logits)
    ones = old_p * (F.logsigmoid(old_logits) - F.logsigmoid(logits))
    zeros = (1 - old_p) * (F.logsigmoid(-old_logits) - F.logsigmoid(-logits))
    return (ones + zeros).sum(dim=-1)


def gaussian_kl(old_mean: th.Tensor, old_log_std: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    Exact KL(old || new) of diagonal Gaussians, summed over the action dimensions.

    ``sum_d log(sigma / sigma_old) + (sigma_old^2 + (mu_old - mu)^2) / (2 sigma^2) - 1/2``

    It also holds for tanh-squashed Gaussians, with the parameters before squashing: a bijection of the actions changes
    both densities by the same factor.

    :param old_mean: mu_old, shape ``(n, action_dim)``.
    :param old_log_std: log sigma_old, shape ``(n, action_dim)``.
    :param mean: mu, shape ``(n, action_dim)``.
    :param log_std: log sigma, shape ``(n, action_dim)``.
    :return: Shape ``(n,)``, nats.
    """
    log_std_change = log_std - old_log_std
    scaled_shift = (old_mean - mean) * th.exp(-log_std)
    return (log_std_change + 0.5 * (th.exp(-2 * log_std_change) + scaled_shift**2 - 1)).sum(dim=-1)


def value_loss(values: th.Tensor, returns: th.Tensor) -> th.Tensor:
    """
    Mean squared error of the critic, without a factor 1/2: ``E[(V - R)^2]``.

    :param values: Predictions of the critic, shape ``(n,)``, return units.
    :param returns: Targets, shape ``(n,)``, return units.
    :return: Scalar loss, squared return units.
    """
    return F.mse_loss(returns, values)


def clip_values(values: th.Tensor, old_values: th.Tensor, clip_range_vf: float) -> th.Tensor:
    """
    Predictions clipped to within ``clip_range_vf`` of those at rollout time.

    ``V_clip = V_old + clip(V - V_old, -clip_range_vf, clip_range_vf)``

    :param values: V, shape ``(n,)``, return units.
    :param old_values: V_old, shape ``(n,)``, return units.
    :param clip_range_vf: Largest change of a prediction, at least 0, return units.
    :return: V_clip, shape ``(n,)``.
    """
    return old_values + th.clamp(values - old_values, -clip_range_vf, clip_range_vf)


def value_loss_clipped_prediction(
    values: th.Tensor, old_values: th.Tensor, returns: th.Tensor, clip_range_vf: float
) -> th.Tensor:
    """
    SB3's form, the squared error of the clipped prediction alone: ``E[(V_clip - R)^2]``.

    The gradient is zero wherever the prediction moved by more than ``clip_range_vf``, even away from the target.

    :param values: V, shape ``(n,)``, return units.
    :param old_values: V_old, shape ``(n,)``, return units.
    :param returns: Targets, shape ``(n,)``, return units.
    :param clip_range_vf: At least 0, return units.
    :return: Scalar loss, squared return units.
    Source: Stable-Baselines3, ``PPO.train``.
    """
    return F.mse_loss(returns, clip_values(values, old_values, clip_range_vf))


def value_loss_clipped_max(
    values: th.Tensor, old_values: th.Tensor, returns: th.Tensor, clip_range_vf: float
) -> th.Tensor:
    """
    The larger of the clipped and the unclipped squared error: ``E[max((V - R)^2, (V_clip - R)^2)]``.

    A prediction that moved too far towards the target has no gradient. One that moved away is pulled back.

    :param values: V, shape ``(n,)``, return units.
    :param old_values: V_old, shape ``(n,)``, return units.
    :param returns: Targets, shape ``(n,)``, return units.
    :param clip_range_vf: At least 0, return units.
    :return: Scalar loss, squared return units.
    Source: OpenAI baselines, ``ppo2/model.py``, without its factor 1/2.
    """
    clipped = clip_values(values, old_values, clip_range_vf)
    return th.max((values - returns) ** 2, (clipped - returns) ** 2).mean()


def vf_clip_fraction(values: th.Tensor, old_values: th.Tensor, clip_range_vf: float) -> th.Tensor:
    """
    Fraction of value predictions that moved by more than ``clip_range_vf`` since the rollout.

    :param values: V, shape ``(n,)``, return units.
    :param old_values: V_old, shape ``(n,)``, return units.
    :param clip_range_vf: At least 0, return units.
    :return: Scalar in [0, 1].
    """
    return th.mean((th.abs(values - old_values) > clip_range_vf).float())


def entropy_loss(entropy: th.Tensor | None, log_prob: th.Tensor) -> th.Tensor:
    """
    Negative mean entropy of the policy.

    :param entropy: Entropy of the action distribution, shape ``(n,)``, nats. None if it has no closed form (SB3's
        gSDE with ``squash_output``): ``-log_prob`` is then used, as in SB3. It has the right mean, but its expected
        gradient at pi_old is zero.
    :param log_prob: log pi(a|s), shape ``(n,)``, nats.
    :return: Scalar loss, nats.
    """
    if entropy is None:
        return -th.mean(-log_prob)
    return -th.mean(entropy)
