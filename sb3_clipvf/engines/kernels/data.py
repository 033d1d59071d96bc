"""What the kernels of an update are given and what they give back, as tuples of arrays and numbers."""

from typing import NamedTuple

import numpy as np
from numba.np.unsafe.ndarray import to_fixed_tuple

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.memory import DIST, GAUSSIAN, N_COLUMNS, matrix

# Totals over the minibatches that were looked at and not skipped; those of the last epoch are started anew with each
# epoch. Then how many were skipped, and the number of the first of them, over all epochs from 0.
(
    N_LOOKED_AT,
    N_STEPS,
    N_EPOCHS,
    POLICY_LOSS,
    ENTROPY_LOSS,
    CLIP_FRACTION,
    RATIO_MAX,
    VALUE_LOSS,
    VF_CLIP_FRACTION,
    GRAD_NORM,
    LAST_LOSS,
    N_IN_EPOCH,
    APPROX_KL,
    KL,
    STOPPED_AT,
    N_SKIPPED,
    FIRST_SKIPPED,
) = range(17)
N_TOTALS = 17

# What is told of one minibatch, by actor and critic: squares of gradients, then terms of the loss and statistics; the
# loss itself is told by the verdict on it.
(
    ACTOR_NORM,
    CRITIC_NORM,
    TOLD_POLICY_LOSS,
    TOLD_ENTROPY_LOSS,
    TOLD_VALUE_LOSS,
    TOLD_EXACT_KL,
    TOLD_APPROX_KL,
    TOLD_RATIO_MAX,
    TOLD_CLIP_FRACTION,
    TOLD_VF_CLIP_FRACTION,
    TOLD_LOSS,
) = range(11)
N_TOLD = 11
# Rows of what the threads share: two in turn, since one thread may be a minibatch ahead of the other's reading, and
# what was told of the first minibatch that was skipped.
SKIPPED_ROW = 2
N_SHARED_ROWS = 3


class Network(NamedTuple):
    """
    The policy as kernels see it.

    :param codes: Kind of distribution, activation, widths of an action and of the distribution's parameters, and
        whether gSDE's standard deviations are ``expln``.
    :param actor_sizes: Width of the actor's input and of each layer.
    :param critic_sizes: The same of the critic.
    :param widths: Actions of each categorical distribution.
    :param table: One row a parameter, actor first; columns as in :mod:`.memory`.
    :param first_critic: Row of the critic's first weight.
    :param log_std_row: Row of a Gaussian's log standard deviations, the last of the actor's; -1: there is none.
    """

    codes: np.ndarray
    actor_sizes: np.ndarray
    critic_sizes: np.ndarray
    widths: np.ndarray
    table: np.ndarray
    first_critic: int
    log_std_row: int


def pack(network: Network) -> np.ndarray:
    """
    Write a policy into one array, which Python hands over to a kernel faster than a tuple of arrays.

    :param network: The policy.
    :return: int64, for :func:`unpack`.
    """
    parts = [network.codes, network.actor_sizes, network.critic_sizes, network.widths, network.table.reshape(-1)]
    head = [*(len(part) for part in parts), network.first_critic, network.log_std_row]
    return np.concatenate([np.array(head, np.int64), *parts])


@fast
def unpack(packed: np.ndarray) -> Network:
    """
    Read what :func:`pack` wrote.

    :param packed: int64.
    :return: Views of it.
    """
    n_head = 7
    ends = np.cumsum(packed[:5]) + n_head
    return Network(
        packed[n_head : ends[0]],
        packed[ends[0] : ends[1]],
        packed[ends[1] : ends[2]],
        packed[ends[2] : ends[3]],
        packed[ends[3] : ends[4]].reshape(-1, N_COLUMNS),
        packed[5],
        packed[6],
    )


class Rollout(NamedTuple):
    """
    One rollout, a row a transition, float32.

    :param observations: Shape ``(n, obs_dim)``.
    :param actions: Shape ``(n, action_dim)``.
    :param old_values: Shape ``(n,)``.
    :param old_log_prob: Shape ``(n,)``.
    :param advantages: Shape ``(n,)``.
    :param returns: Shape ``(n,)``.
    :param old_dist: Shape ``(n, k)``, or ``(0, 0)``.
    :param n_steps: Steps of each environment.
    :param n_envs: Environments; rows run step by step.
    """

    observations: np.ndarray
    actions: np.ndarray
    old_values: np.ndarray
    old_log_prob: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    old_dist: np.ndarray
    n_steps: int
    n_envs: int


class Numbers(NamedTuple):
    """
    Coefficients and settings of one update; all float64.

    :param clip_range: epsilon; infinity: not clipped.
    :param value_form: As in :mod:`.losses`.
    :param clip_range_vf: Return units.
    :param ent_coef: Weight of the entropy.
    :param vf_coef: Weight of the value loss.
    :param kl_coef: beta.
    :param normalize: 1 where advantages are normalised in each minibatch.
    :param shift: Taken from all advantages otherwise.
    :param scale: They are divided by it otherwise.
    :param advantage_eps: Added to their standard deviation.
    :param max_grad_norm: Bound on the joint norm.
    :param target_kl: nats; infinity: no early stop.
    :param kl_from_epoch: First epoch whose exact KL is measured.
    :param step: Steps that the optimizer has made.
    :param learning_rate: At least 0.
    :param beta1: Adam's.
    :param beta2: Adam's.
    :param eps: Adam's.
    :param weight_decay: Adam's or AdamW's.
    :param decoupled: 1 for AdamW.
    :param skips: 1 where a minibatch that is not finite is left out; else it ends the update.
    """

    clip_range: float
    value_form: float
    clip_range_vf: float
    ent_coef: float
    vf_coef: float
    kl_coef: float
    normalize: float
    shift: float
    scale: float
    advantage_eps: float
    max_grad_norm: float
    target_kl: float
    kl_from_epoch: float
    step: float
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: float
    skips: float


N_NUMBERS = len(Numbers._fields)


def pack_numbers(numbers: Numbers) -> np.ndarray:
    """
    Write coefficients and settings into one array.

    :param numbers: Of an update.
    :return: float64, for :func:`unpack_numbers`.
    """
    return np.array(numbers, np.float64)


@fast
def unpack_numbers(packed: np.ndarray) -> Numbers:
    """
    Read what :func:`pack_numbers` wrote.

    :param packed: float64.
    :return: Coefficients and settings.
    """
    return Numbers(*to_fixed_tuple(packed, N_NUMBERS))


@fast
def log_std_of(network: Network, column: int) -> np.ndarray:
    """
    The Gaussian's log standard deviations, or their gradients.

    :param network: The policy.
    :param column: PARAM or GRAD.
    :return: Shape ``(1, action_dim)``, no copy; empty where the distribution is another.
    """
    if network.codes[DIST] != GAUSSIAN:
        return np.empty((0, 0), np.float32)
    return matrix(network.table[network.log_std_row, column], 1, network.actor_sizes[-1])
