"""
ClipPPO in the RL Zoo: the console command ``sb3-clipvf``, and :func:`register` for scripts of one's own.

``commands`` holds the sub-commands, ``parsing`` and ``checks`` their options, ``process`` process state and errors,
``finding`` which run is taken, ``experiment`` how settings are read, ``tuning`` the hyperparameter search, ``plots``
what plots need, ``terminal`` what a training shows, ``hub`` the model card.
"""

from sb3_clipvf.zoo.commands import ALGORITHM, COMMANDS, hyperparams_path, main, register

__all__ = ["ALGORITHM", "COMMANDS", "hyperparams_path", "main", "register"]
