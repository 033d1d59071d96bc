"""Networks of suites that Stable-Baselines3's policies do not have."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn


class HiddenLayer(BaseFeaturesExtractor):
    """A layer of ``features_dim`` rectified units."""

    def __init__(self, observation_space: gym.Space[Any], features_dim: int) -> None:
        super().__init__(observation_space, features_dim)
        n_inputs = get_flattened_obs_dim(observation_space)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(n_inputs, features_dim), nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Return features ``(batch, features_dim)``."""
        features: th.Tensor = self.layers(observations)
        return features


class SharedLayerPolicy(ActorCriticPolicy):
    """A policy whose actor and critic are linear in one hidden layer that they share."""

    def __init__(self, *args: Any, width: int, **kwargs: Any) -> None:
        shared = {"features_extractor_class": HiddenLayer, "features_extractor_kwargs": {"features_dim": width}}
        super().__init__(*args, **{**kwargs, "net_arch": [], **shared})
