"""Pendulum-v1 as a tensor environment: 4096 pendulums step as tensors, on a GPU if there is one."""

import math

import torch as th
from gymnasium import spaces

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import TensorStep

MAX_SPEED, MAX_TORQUE, TIME_STEP, GRAVITY = 8.0, 2.0, 0.05, 10.0


class TensorPendulum:
    """Gymnasium's Pendulum-v1, with its equations and its limit of 200 steps, for many rows at once."""

    def __init__(self, num_envs=4096, device="cpu", time_limit=200):
        self.num_envs, self.device, self.time_limit = num_envs, th.device(device), time_limit
        high = th.tensor([1.0, 1.0, MAX_SPEED]).numpy()
        self.observation_space = spaces.Box(-high, high)
        self.action_space = spaces.Box(-MAX_TORQUE, MAX_TORQUE, (1,))
        self.generator = th.Generator(self.device)
        self.widths = th.tensor([[2 * math.pi], [2.0]], device=self.device)
        self.angles, self.speeds = th.zeros((2, num_envs), device=self.device)
        self.n_steps = th.zeros(num_envs, dtype=th.int64, device=self.device)
        self.never = th.zeros(num_envs, dtype=th.bool, device=self.device)

    def reset_tensors(self, seed=None):
        """Begin an episode in every row."""
        if seed is not None:
            self.generator.manual_seed(seed)
        angles, speeds = self._first_states()
        self.angles.copy_(angles)
        self.speeds.copy_(speeds)
        self.n_steps.zero_()
        return self._observations()

    def step_tensors(self, actions):
        """Step all rows, in-place for CUDA graphs, and begin the next episode where one has ended."""
        torques = actions[:, 0].clamp(-MAX_TORQUE, MAX_TORQUE)
        off = th.remainder(self.angles + math.pi, 2 * math.pi) - math.pi
        costs = off * off + 0.1 * self.speeds * self.speeds + 0.001 * torques * torques
        pull = th.add(1.5 * GRAVITY * th.sin(self.angles), torques, alpha=3.0)
        self.speeds.add_(pull, alpha=TIME_STEP).clamp_(-MAX_SPEED, MAX_SPEED)
        self.angles.add_(self.speeds, alpha=TIME_STEP)
        self.n_steps.add_(1)
        final = self._observations()

        # No branch reads the device: all rows draw a new state, and those whose episode ended take it.
        truncated = self.n_steps >= self.time_limit
        angles, speeds = self._first_states()
        th.where(truncated, angles, self.angles, out=self.angles)
        th.where(truncated, speeds, self.speeds, out=self.speeds)
        self.n_steps.masked_fill_(truncated, 0)
        return TensorStep(self._observations(), -costs, self.never, truncated, final)

    def close(self):
        """Free nothing."""

    def _first_states(self):
        uniform = th.rand((2, self.num_envs), generator=self.generator, device=self.device)
        return (uniform - 0.5) * self.widths

    def _observations(self):
        return th.stack([th.cos(self.angles), th.sin(self.angles), self.speeds], dim=1)


if __name__ == "__main__":
    device = "cuda" if th.cuda.is_available() else "cpu"
    model = ClipPPO("MlpPolicy", TensorPendulum(device=device), n_steps=32, batch_size=32_768, n_epochs=4, seed=0)
    model.learn(2_621_440)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    print(f"mean return of the last {len(returns)} episodes: {sum(returns) / len(returns):.1f}")
