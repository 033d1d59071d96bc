"""Actions for the environments: clipped, unscaled or unchanged."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from test_collection import BOX, make

from sb3_clipvf.engines.env_actions import env_actions
from sb3_clipvf.policies import SquashedActorCriticPolicy


class TestActions:
    def test_they_are_clipped_to_the_box(self) -> None:
        actions = np.array([[-3.0, 1.0], [1.0, 5.0]], np.float32)
        assert env_actions(make(), BOX, actions).tolist() == [[-2, 1], [1, 4]]

    @pytest.mark.parametrize(
        ("policy_class", "kwargs"),
        [(SquashedActorCriticPolicy, {}), (ActorCriticPolicy, {"use_sde": True, "squash_output": True})],
    )
    def test_those_of_squashing_policies_are_unscaled(self, policy_class: type[Any], kwargs: dict[str, Any]) -> None:
        actions = np.array([[-1.0, 0.0], [0.5, 1.0]], np.float32)
        # -1, 0, 0.5 and 1 of [-2, 2] and [0, 4]
        assert env_actions(make(policy_class, **kwargs), BOX, actions).tolist() == [[-2, 2], [1, 4]]

    @pytest.mark.parametrize(
        "space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)], ids=str
    )
    def test_of_other_spaces_are_copies(self, space: spaces.Space[Any]) -> None:
        actions = np.array([1, 0, 1])
        given = env_actions(make(act=space), space, actions)
        np.testing.assert_array_equal(given, actions, strict=True)
        assert not np.shares_memory(given, actions)

    def test_nan_is_kept(self) -> None:
        actions = env_actions(make(), BOX, np.array([[np.nan, np.inf], [-np.inf, 1.0]], np.float32))
        np.testing.assert_array_equal(actions, [[np.nan, 4], [-2, 1]])
