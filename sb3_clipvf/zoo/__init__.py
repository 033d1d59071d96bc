"""
ClipPPO in the RL Zoo: the console command ``sb3-clipvf``, and :func:`register` for the user's own scripts.

The command:

- ``cli``: its entry point;
- ``commands``: the table of sub-commands with their defaults;
- ``options``: options of this package;
- ``parsing``: changes of argparse's parsers;
- ``errors``: errors in one line;
- ``patching``: what is replaced in other packages while it runs;
- ``registration``: ``clipppo`` in the Zoo;
- ``process``: environment variables, display and output files;
- ``terminal``: the tables of a training run.

The sub-commands:

- ``experiment``: ``train``;
- ``settings``: checks of settings;
- ``entries``: forms of entries in settings;
- ``vec_env``: ``--vec-env``;
- ``training_log``: the log in the run's folder;
- ``tuning``: ``-optimize``;
- ``report``: ``report`` for one run;
- ``comparison``: the page about many runs;
- ``compilation``: ``compile``;
- ``plot_checks``: checks before the Zoo's plots;
- ``hub``: texts for the Hugging Face hub;
- ``recording``: models and folder of ``record_training``;
- ``benchmark``: evaluations and table of ``benchmark``.

Runs that exist:

- ``run_folders``: numbers of runs, the run that options select, the command that resumes it;
- ``checked_files``: models, statistics and settings of a run, read without running code;
- ``runs``: settings and evaluation of one run, for Python code as well;
- ``training_curve``: training episodes of a run, from its Monitor files;
- ``model_choice``: the model that a command loads, and its statistics of ``VecNormalize``;
- ``resume``: the command line that ``--resume`` builds again.
"""

from sb3_clipvf.zoo.cli import main
from sb3_clipvf.zoo.commands import ALGORITHM, COMMANDS, hyperparams_path
from sb3_clipvf.zoo.registration import register

__all__ = ["ALGORITHM", "COMMANDS", "hyperparams_path", "main", "register"]
