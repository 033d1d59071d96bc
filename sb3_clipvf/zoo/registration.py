"""Register ClipPPO with the RL Zoo."""

from sb3_clipvf.zoo.defaults import ALGORITHM


def register() -> None:
    """
    Make the RL Zoo know ClipPPO as ``clipppo``: the algorithm, its hyperparameter search, how its settings are read.

    It holds for the Zoo's scripts and for scripts of one's own: from then on, ``rl_zoo3.exp_manager.ExperimentManager``
    and classes derived from it make an :func:`~sb3_clipvf.zoo.experiment.experiment_manager`, even if they were
    imported before. Calling it again changes nothing.
    """
    from rl_zoo3 import ALGOS
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    from sb3_clipvf.clip_ppo import ClipPPO
    from sb3_clipvf.zoo.experiment import new_manager
    from sb3_clipvf.zoo.tuning import convert_clipppo_params, sample_clipppo_params

    ALGOS[ALGORITHM] = ClipPPO
    HYPERPARAMS_SAMPLER[ALGORITHM] = sample_clipppo_params
    HYPERPARAMS_CONVERTER[ALGORITHM] = convert_clipppo_params
    # rl_zoo3 2.9.2 makes linear schedules of all strings and has no other way to extend its manager. Scripts may have
    # imported the class already, so it must stay the same object.
    ExperimentManager.__new__ = staticmethod(new_manager)  # type: ignore[assignment]
