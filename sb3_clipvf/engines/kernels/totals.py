"""Indices of statistics in the kernels' arrays: ``stats`` of a minibatch, ``totals`` of an update."""

from typing import NamedTuple


class _Stats(NamedTuple):
    policy_loss: int
    entropy_loss: int
    value_loss: int
    kl: int  # exact KL, nats; 0 if it is not measured
    approx_kl: int  # estimator k3, nats
    ratio_max: int
    clip_fraction: int
    vf_clip_fraction: int
    loss: int
    squares: int  # sum of the squares of all gradients


class _Totals(NamedTuple):
    n_minibatches: int  # evaluated and not skipped; the others are sums over these, if not stated otherwise
    n_steps: int  # of the optimizer
    n_epochs: int  # begun
    policy_loss: int
    entropy_loss: int
    value_loss: int
    clip_fraction: int
    vf_clip_fraction: int
    grad_norm: int  # sum over the steps
    ratio_max: int  # largest of the update
    last_loss: int  # of the last minibatch
    n_in_epoch: int  # this one and the two below: of the present epoch
    approx_kl: int
    kl: int
    stopped_at_kl: int  # approx_kl of the minibatch that ended the update by target_kl; 0 if none did
    n_skipped: int
    first_skipped: int  # number of the first skipped minibatch, counted from 0 over all epochs


STAT = _Stats(*range(len(_Stats._fields)))
TOTAL = _Totals(*range(len(_Totals._fields)))
