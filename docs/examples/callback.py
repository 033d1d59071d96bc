"""Write a callback that logs a value and stops the training."""

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_clipvf import ClipPPO


class ShortestEpisode(BaseCallback):
    """
    Log the shortest episode of each rollout, and stop when it is long enough.

    :param goal: Length to reach, in environment steps.
    """

    def __init__(self, goal: int) -> None:
        super().__init__()
        self.goal = goal
        self.lengths: list[int] = []
        self.reached = False

    def _on_step(self) -> bool:
        # `self.locals` holds the variables of the rollout under SB3's names.
        self.lengths += [info["episode"]["l"] for info in self.locals["infos"] if "episode" in info]
        return not self.reached

    def _on_rollout_end(self) -> None:
        shortest = min(self.lengths, default=0)
        self.logger.record("rollout/shortest_episode", shortest)
        self.reached = shortest >= self.goal
        self.lengths.clear()


env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
model = ClipPPO("MlpPolicy", env, n_steps=256, seed=0, device="cpu", verbose=1)
model.learn(30_720, callback=ShortestEpisode(40), log_interval=5)
print(f"stopped after {model.num_timesteps:,} steps")
