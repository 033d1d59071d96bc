"""How updates of the native engine are divided: groups of rows, pieces of parameters."""

import numpy as np
import pytest
from stable_baselines3.common.policies import ActorCriticPolicy
from test_engines import BOX, OBS

from sb3_clipvf.engines import division
from sb3_clipvf.engines.binding import bind
from sb3_clipvf.engines.division import DividedPolicy, count_groups
from sb3_clipvf.engines.kernels.memory import GRAD, PARAM, SIZE
from sb3_clipvf.engines.native import _kernel_policy


@pytest.mark.parametrize(
    ("batch_size", "n_parameters", "n_groups"),
    [
        (64, 4_610, 1),  # 64-64, CartPole-v1
        (2048, 5_700, 1),  # 64-64, HalfCheetah-v5
        (16_384, 5_700, 11),
        (128, 72_000, 1),  # 256-256, HalfCheetah-v5
        (256, 72_000, 2),
        (64, 1_100_000, 1),  # 1024-1024
        (1024, 1_100_000, 8),
        (24_576, 191_000, 16),  # 512-256-128, Box(48) to 12 actions
        (1, 1, 1),
        (1, 10**9, 1),
        (10**6, 1, 1),
    ],
)
def test_groups_of_a_minibatch(batch_size: int, n_parameters: int, n_groups: int) -> None:
    assert count_groups(batch_size, n_parameters) == n_groups


@pytest.mark.parametrize("batch_size", [3, 8, 10, 11])
def test_a_divided_policy_has_every_parameter_once(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in {"LEAST_ROWS": 4, "LEAST_WORK": 0, "PIECE_SIZE": 10, "BLOCK_ROWS": 2}.items():
        monkeypatch.setattr(division, name, number)
    policy = ActorCriticPolicy(OBS, BOX, lambda _: 3e-3, net_arch=[8, 5])
    binding = bind(policy)
    divided = DividedPolicy(_kernel_policy(binding), batch_size)
    shared, rule = divided.shared(), divided.division
    assert len(divided.policies) == len(shared.partials) + 1 == max(1, batch_size // 4)
    assert rule.group_rows * len(divided.policies) >= batch_size > rule.group_rows * (len(divided.policies) - 1)
    assert rule.block_rows == 2
    assert shared.pieces[:, SIZE].max() == 10
    parameters = [parameter for row in binding.tensors for parameter in row[:2]]
    for column, tensors in ((PARAM, parameters[::2]), (GRAD, parameters[1::2])):
        expected = [tensor.data_ptr() + 4 * k for tensor in tensors for k in range(tensor.numel())]
        assert [address + 4 * k for size, address in shared.pieces[:, [SIZE, column]] for k in range(size)] == expected
    n_actor = sum(parameter.numel() for parameter in binding.plain.actor_parameters)
    assert shared.pieces[: rule.n_actor_pieces, SIZE].sum() == n_actor
    # Where packed policies differ are the addresses of gradients; those of a group lie side by side.
    n = len(binding.table)
    sizes = np.cumsum([0, *binding.table[:-1, SIZE]])
    for group, partials in zip(divided.policies[1:], shared.partials, strict=True):
        changed = group != divided.policies[0]
        assert changed.sum() == n
        np.testing.assert_array_equal(group[changed], partials.ctypes.data + 4 * sizes)
    assert shared.partials.shape[1] == binding.table[:, SIZE].sum()


@pytest.mark.parametrize(
    ("net_arch", "n_rows", "is_long"),
    [
        ([64, 64], 20 * 256, False),  # CartPole-v1: 4 ms
        ([64, 64], 10 * 2048, False),  # SB3's defaults: 24 ms
        ([512, 512], 1024, True),  # 0.3 s
        ([2], 10**7, True),
    ],
)
def test_long_updates_leave_the_main_thread_to_signals(net_arch: list[int], n_rows: int, is_long: bool) -> None:
    policy = ActorCriticPolicy(OBS, BOX, lambda _: 3e-3, net_arch=net_arch)
    assert DividedPolicy(_kernel_policy(bind(policy)), 64).is_long(n_rows) == is_long
