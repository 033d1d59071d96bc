"""Replace the clipped objective by the KL penalty, with a fixed and with an adaptive coefficient."""

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_clipvf import ClipPPO

OBJECTIVES = {
    "clipped": {"clip_range": 0.2},
    "fixed penalty": {"clip_range": None, "kl_coef": 1.0},
    "adaptive penalty": {"clip_range": None, "kl_coef": 1.0, "adaptive_kl_target": 0.01},
    "both": {"clip_range": 0.2, "kl_coef": 1.0},
}

for name, arguments in OBJECTIVES.items():
    env = make_vec_env("CartPole-v1", n_envs=8, seed=0)
    model = ClipPPO("MlpPolicy", env, n_steps=64, gae_lambda=0.9, seed=0, device="cpu", **arguments)
    model.learn(8_192)
    mean, std = evaluate_policy(model, env, n_eval_episodes=5)
    print(f"{name}: mean return {mean:.1f} +/- {std:.1f}")
