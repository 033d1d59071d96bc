"""Resume a training from a checkpoint, with bit for bit the same weights as without the interruption."""

import tempfile

import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_clipvf import ClipPPO, TrainingCheckpoint

env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
model = ClipPPO("MlpPolicy", env, n_steps=128, learning_rate="lin_3e-4", seed=0, device="cpu")
folder = tempfile.mkdtemp()  # a training refuses a folder that has checkpoints of another one
model.learn(8_192, callback=TrainingCheckpoint(every_timesteps=2_048, path=folder))

# Resume from the middle, as after a kill. Given the folder, `resume` loads its newest checkpoint.
env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
resumed = ClipPPO.resume(f"{folder}/checkpoint_4096.zip", env, device="cpu")
print(f"resumed at {resumed.num_timesteps:,}, {resumed.remaining_timesteps:,} steps to go")
callback = TrainingCheckpoint(every_timesteps=2_048, path=folder)
resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False, callback=callback)

for name, weights in model.policy.state_dict().items():
    assert th.equal(weights, resumed.policy.state_dict()[name])
print("the same weights")
