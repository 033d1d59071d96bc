"""Train in environments that step together: gymnasium's vectorised CartPole, with normalised observations."""

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import FastVecNormalize, as_vec_env

env = FastVecNormalize(as_vec_env(gym.make_vec("CartPole-v1", num_envs=64)), norm_reward=False)
model = ClipPPO("MlpPolicy", env, n_steps=32, batch_size=256, gae_lambda=0.9, seed=0, device="cpu")
model.learn(40_960)

# The model needs the statistics: save both and load both.
model.save("cartpole")
env.save("vecnormalize.pkl")

evaluation_env = FastVecNormalize.load("vecnormalize.pkl", as_vec_env(gym.make_vec("CartPole-v1", num_envs=8)))
evaluation_env.training = False
mean, std = evaluate_policy(ClipPPO.load("cartpole", device="cpu"), evaluation_env, n_eval_episodes=8)
print(f"mean return {mean:.1f} +/- {std:.1f}")
