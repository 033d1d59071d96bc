"""What Python passes to the kernels of an update, as tuples of arrays and numbers."""

from typing import NamedTuple

import numpy as np
from numba.np.unsafe.ndarray import to_fixed_tuple

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels.memory import N_COLUMNS

# Kinds of action distribution; a state-dependent one is gSDE's Gaussian.
CATEGORICAL, BERNOULLI, GAUSSIAN, STATE_DEPENDENT = range(4)
# Activations of hidden layers.
TANH, RELU, ELU, LEAKY_RELU, SILU = range(5)
# Types of stored observations.
FLOAT32, FLOAT64, UINT8, INT8 = range(4)


class Mlp(NamedTuple):
    """One network of linear layers with an activation between them."""

    sizes: np.ndarray  # widths of the input and of each layer
    table: np.ndarray  # a row for each weight and bias, columns as in `memory`; an actor's last row may be `log_std`
    activation: int


class Policy(NamedTuple):
    """A policy whose actor and critic share no layer."""

    actor: Mlp
    critic: Mlp
    kind: int  # of the action distribution
    widths: np.ndarray  # number of actions of each categorical distribution
    use_expln: int  # 1 if gSDE's standard deviations are SB3's `expln`


_N_HEAD = 8  # numbers before the arrays of a packed policy: three settings, then the arrays' lengths


def pack(policy: Policy) -> np.ndarray:
    """Return a policy as one int64 array, which Python passes to a kernel in less time than a tuple of arrays."""
    actor, critic = policy.actor, policy.critic
    parts = [actor.sizes, actor.table.reshape(-1), critic.sizes, critic.table.reshape(-1), policy.widths]
    head = [policy.kind, actor.activation, policy.use_expln, *map(len, parts)]
    return np.concatenate([np.array(head, np.int64), *parts])


@fast
def unpack(packed: np.ndarray) -> Policy:
    """Return what :func:`pack` wrote, as views."""
    actor_table = _N_HEAD + packed[3]
    critic_sizes = actor_table + packed[4]
    critic_table = critic_sizes + packed[5]
    widths = critic_table + packed[6]
    table = packed[actor_table:critic_sizes].reshape(-1, N_COLUMNS)
    actor = Mlp(packed[_N_HEAD:actor_table], table, packed[1])
    table = packed[critic_table:widths].reshape(-1, N_COLUMNS)
    critic = Mlp(packed[critic_sizes:critic_table], table, packed[1])
    return Policy(actor, critic, packed[0], packed[widths : widths + packed[7]], packed[2])


class RolloutArrays(NamedTuple):
    """
    One rollout of ``n = n_steps * n_envs`` transitions, in rows that run step by step.

    All arrays are float32, except for the observations. These are the bytes of an array of one of the types above: a
    copy of uint8 as float32 would take four times their memory.
    """

    observations: np.ndarray  # (n, bytes in a row), uint8
    obs_type: int
    actions: np.ndarray  # (n, action_dim)
    old_values: np.ndarray  # (n,), return units
    old_log_prob: np.ndarray  # (n,), nats
    advantages: np.ndarray  # (n,)
    returns: np.ndarray  # (n,)
    old_dist: np.ndarray  # parameters of the old distributions, (n, k); (0, 0) without them
    n_steps: int
    n_envs: int


class Division(NamedTuple):
    """How a minibatch is divided: into groups of rows, which threads share, and each group into blocks."""

    batch_size: int
    group_rows: int
    block_rows: int
    n_actor_pieces: int  # of `Shared.pieces`; the critic has the others


class Shared(NamedTuple):
    """
    Arrays that the threads of an update share.

    ``squares`` and ``stats`` have two rows, which minibatches use in turn: a thread may be one minibatch ahead.
    """

    pieces: np.ndarray  # table of all parameters, cut into rows of limited size
    partials: np.ndarray  # gradients of the groups but the first, float32, (n_groups - 1, n_parameters)
    squares: np.ndarray  # sums of the squared gradients of pieces, float64, (2, n_pieces)
    stats: np.ndarray  # statistics of tasks, float64, (2, n_tasks, len(STAT))
    skipped: np.ndarray  # statistics of the first skipped minibatch, float64, (len(STAT),)
    counters: np.ndarray  # of the barrier, int64
    totals: np.ndarray  # statistics of the update, float64, (len(TOTAL),)


class Hyperparameters(NamedTuple):
    """Settings, coefficients and the optimizer's options of one update, all float64."""

    clip_range: float  # epsilon; infinity: not clipped
    value_form: float  # NOT_CLIPPED, CLIPPED_MAX or CLIPPED_PREDICTION of `losses`
    clip_range_vf: float  # return units
    ent_coef: float
    vf_coef: float
    kl_coef: float  # beta, 1/nats
    normalize: float  # 1: advantages are normalised in each minibatch; 0: they are (advantages - shift) / scale
    shift: float
    scale: float
    advantage_eps: float  # added to the standard deviation of a minibatch's advantages
    max_grad_norm: float
    target_kl: float  # nats; infinity: no early stop
    kl_from_epoch: float  # first epoch whose exact KL is measured
    step: float  # steps that the optimizer took before this update
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: float  # 1: weight decay as in AdamW; 0: as in Adam
    skips: float  # 1: a non-finite minibatch is skipped; 0: it ends the update


N_HYPERPARAMETERS = len(Hyperparameters._fields)


@fast
def unpack_hyperparameters(packed: np.ndarray) -> Hyperparameters:
    """Return the hyperparameters that a float64 array holds in their order."""
    return Hyperparameters(*to_fixed_tuple(packed, N_HYPERPARAMETERS))
