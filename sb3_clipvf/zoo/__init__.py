"""
ClipPPO in the RL Zoo: the console command ``sb3-clipvf``, and :func:`register` for the user's own scripts.

The command:

- ``cli``, ``commands``: its entry point; the table of sub-commands with their defaults;
- ``options``, ``parsing``, ``errors``: options of this package; changes of argparse's parsers; errors in one line;
- ``patching``, ``registration``: what is replaced in other packages while it runs; ``clipppo`` in the Zoo;
- ``process``, ``terminal``: environment variables, display and output files; the tables of a training run.

The sub-commands:

- ``experiment``, ``settings``, ``entries``: ``train``; checks of settings; forms of entries in settings;
- ``vec_env``, ``training_log``, ``tuning``: ``--vec-env``; the log in the run's folder; ``-optimize``;
- ``report``, ``comparison``: ``report`` for one run; the page about many runs;
- ``compilation``, ``plot_checks``, ``hub``: ``compile``; checks before the Zoo's plots; texts for the Hugging Face hub;
- ``recording``, ``benchmark``: models and folder of ``record_training``; evaluations and table of ``benchmark``.

Runs that exist:

- ``run_folders``: numbers of runs, the run that options select, the command that resumes it;
- ``checked_files``: models, statistics and settings of a run, read without running code;
- ``runs``: training and evaluation of one run, for Python code as well;
- ``model_choice``: the model that a command loads, and its statistics of ``VecNormalize``;
- ``resume``: the command line that ``--resume`` builds again.
"""

from sb3_clipvf.zoo.cli import main
from sb3_clipvf.zoo.commands import ALGORITHM, COMMANDS, hyperparams_path
from sb3_clipvf.zoo.registration import register

__all__ = ["ALGORITHM", "COMMANDS", "hyperparams_path", "main", "register"]
