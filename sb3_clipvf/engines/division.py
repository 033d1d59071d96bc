"""How an update of the native engine is divided: minibatches into groups of rows, parameters into pieces."""

import numpy as np

from sb3_clipvf.engines.kernels import inputs
from sb3_clipvf.engines.kernels.barrier import N_COUNTERS
from sb3_clipvf.engines.kernels.memory import GRAD, SIZE
from sb3_clipvf.engines.kernels.totals import STAT, TOTAL

MOST_GROUPS = 16
"""Largest number of groups in a minibatch. A thread's task is the gradient of one network over one group."""

LEAST_ROWS = 128
"""
Smallest number of rows in a group. A minibatch of 256 then has two groups, which four threads can share. On one thread
and on two, two groups take 3 % longer than one for networks of 256-256, and 9 to 20 % longer for 1024-1024.
"""

LEAST_WORK = 8_000_000
"""Smallest rows x parameters of a group: about 0.5 ms, much longer than threads take to wait for each other."""

BLOCK_ROWS = 256
"""Rows of a block. Per row, matrix products take longer in smaller blocks, and elementwise functions in larger ones."""

PIECE_SIZE = 8192
"""Largest number of elements in a piece. A thread adds the gradients of whole pieces, and steps them."""

LONG_WORK = 300_000_000
"""Rows x parameters of an update that lasts too long to delay signals until its end: 50 to 100 ms."""

_ROW_WORK = 200  # parameters that take as long as what else an update does with a row

_BYTES = 4  # of a float32


def count_groups(batch_size: int, n_parameters: int) -> int:
    """
    Return the number of groups of a minibatch's rows, for networks of at most ``n_parameters`` each.

    It must not depend on the number of threads, since sums over different groups are rounded differently.
    """
    return min(MOST_GROUPS, max(1, batch_size // max(LEAST_ROWS, LEAST_WORK // n_parameters)))


def rows_to_share(n_parameters: int) -> int:
    """Return the number of rows for which a forward pass of both networks is worth a thread of its own."""
    return max(BLOCK_ROWS, LEAST_WORK // n_parameters)


class DividedPolicy:
    """
    A policy's parameter tables, divided for minibatches of ``batch_size`` rows, and memory for the groups' gradients.

    ``policies`` holds the packed policy once for each group, with the addresses of that group's gradients. The first
    group has the policy's own.
    """

    def __init__(self, policy: inputs.Policy, batch_size: int) -> None:
        tables = (policy.actor.table, policy.critic.table)
        pieces = [_pieces(table) for table in tables]
        n_groups = count_groups(batch_size, max(int(table[:, SIZE].sum()) for table in tables))
        self._pieces = np.array(pieces[0] + pieces[1], np.int64)
        self._partials = np.empty((n_groups - 1, self._pieces[:, SIZE].sum()), np.float32)
        self.division = inputs.Division(
            batch_size=batch_size,
            group_rows=-(-batch_size // n_groups),
            block_rows=min(batch_size, BLOCK_ROWS),
            n_actor_pieces=len(pieces[0]),
        )
        self.policies = np.stack([inputs.pack(policy), *(_with_gradients(policy, row) for row in self._partials)])

    def is_long(self, n_rows: int) -> bool:
        """Return whether an update of so many rows, counted in each epoch, is too long to delay signals."""
        return n_rows * (int(self._partials.shape[1]) + _ROW_WORK) >= LONG_WORK

    def shared(self) -> inputs.Shared:
        """Return the arrays that the threads of an update share."""
        return inputs.Shared(
            pieces=self._pieces,
            partials=self._partials,
            squares=np.empty((2, len(self._pieces))),
            stats=np.empty((2, 2 * len(self.policies), len(STAT))),
            skipped=np.zeros(len(STAT)),
            counters=np.zeros(N_COUNTERS, np.int64),
            totals=np.zeros(len(TOTAL)),
        )


def _pieces(table: np.ndarray) -> list[list[int]]:
    """Return the rows of a parameter table, cut into rows of at most ``PIECE_SIZE`` elements."""
    return [
        [min(PIECE_SIZE, size - start), *(address + _BYTES * start for address in addresses)]
        for size, *addresses in table.tolist()
        for start in range(0, size, PIECE_SIZE)
    ]


def _with_gradients(policy: inputs.Policy, gradients: np.ndarray) -> np.ndarray:
    """Return a packed policy whose gradients are stored one after the other, the actor's first."""
    n_actor = len(policy.actor.table)
    table = np.concatenate([policy.actor.table, policy.critic.table])
    table[:, GRAD] = gradients.ctypes.data + _BYTES * (np.cumsum(table[:, SIZE]) - table[:, SIZE])
    actor = policy.actor._replace(table=table[:n_actor])
    return inputs.pack(policy._replace(actor=actor, critic=policy.critic._replace(table=table[n_actor:])))
