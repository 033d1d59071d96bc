"""ClipPPO in the RL Zoo: the console command ``sb3-clipvf``, and :func:`register` for the user's own scripts."""

from sb3_clipvf.zoo.cli import main
from sb3_clipvf.zoo.commands import ALGORITHM, COMMANDS, hyperparams_path
from sb3_clipvf.zoo.registration import register

__all__ = ["ALGORITHM", "COMMANDS", "hyperparams_path", "main", "register"]
