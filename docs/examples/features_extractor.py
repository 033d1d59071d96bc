"""Train with a custom features extractor: any PyTorch module, passed as in SB3."""

import gymnasium as gym
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_clipvf import ClipPPO


class NormalisedLinear(BaseFeaturesExtractor):
    """A linear layer with layer normalisation."""

    def __init__(self, observation_space: gym.spaces.Box, features_dim: int = 32) -> None:
        super().__init__(observation_space, features_dim)
        n_inputs = observation_space.shape[0]
        self.layers = nn.Sequential(nn.Linear(n_inputs, features_dim), nn.LayerNorm(features_dim), nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


policy_kwargs = {"features_extractor_class": NormalisedLinear, "net_arch": [32]}
model = ClipPPO("MlpPolicy", "CartPole-v1", n_steps=256, policy_kwargs=policy_kwargs, seed=0, device="cpu")
model.learn(4_096)

# The file contains the code of the class. Loading runs this code only if the file is trusted.
model.save("own_extractor")
loaded = ClipPPO.load("own_extractor", device="cpu", trust_pickle=True)
mean, std = evaluate_policy(loaded, model.get_env(), n_eval_episodes=5)
print(f"mean return {mean:.1f} +/- {std:.1f}")
