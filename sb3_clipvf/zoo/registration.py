"""Register ClipPPO with the RL Zoo."""

from sb3_clipvf.zoo.commands import ALGORITHM
from sb3_clipvf.zoo.patching import patch_permanently


def register() -> None:
    """
    Register ClipPPO as the RL Zoo's algorithm ``clipppo``, with its hyperparameter search and experiment manager.

    From then on, ``rl_zoo3.exp_manager.ExperimentManager`` and classes derived from it create an
    :func:`~sb3_clipvf.zoo.experiment.experiment_manager`, even if they were imported before. Calling it again changes
    nothing.
    """
    from rl_zoo3 import ALGOS
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    from sb3_clipvf.clip_ppo import ClipPPO
    from sb3_clipvf.zoo.experiment import new_manager
    from sb3_clipvf.zoo.tuning import convert_clipppo_params, sample_clipppo_params

    ALGOS[ALGORITHM] = ClipPPO
    HYPERPARAMS_SAMPLER[ALGORITHM] = sample_clipppo_params
    HYPERPARAMS_CONVERTER[ALGORITHM] = convert_clipppo_params
    patch_permanently("new_manager", staticmethod(new_manager))
