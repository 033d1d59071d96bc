"""What ClipPPO keeps and takes up again: models in files, their weights, and trainings that were interrupted."""

import io
import os
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self, cast

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict

from sb3_clipvf.arguments import values_to_load
from sb3_clipvf.collection import RolloutCollector
from sb3_clipvf.common.validation import check_device, same_spaces
from sb3_clipvf.files.codec import NOTE
from sb3_clipvf.files.model import check_model, network_bound, read_model, write_model
from sb3_clipvf.files.trust import TrustPickle, trust_of

if TYPE_CHECKING:
    from sb3_clipvf.checkpoint.resume import Resumed
    from sb3_clipvf.clip_ppo import ClipPPO


class SavedAlgorithm(RolloutCollector):
    """The part of ClipPPO that is about files: it saves and loads models, and resumes trainings."""

    _resumed: "Resumed | None" = None

    # Of the file that was loaded, until `learn` compares it.
    _n_envs_before: Any = None

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, without pickles but for what JSON cannot express: functions and classes of the user's.

        A file takes the place of an older one only when it is complete; an open file is written to as it is. A warning
        names the attributes that are pickled.

        :param path: Zip file, with or without its suffix, or an open binary file.
        :param exclude: Attributes to leave out, besides those that are always left out.
        :param include: Attributes to save although they are left out otherwise.
        :raises OSError: If the file cannot be written. What ``path`` held before is then unchanged.
        """
        attributes = self._saved_attributes(exclude or (), include or ())
        write_model(path, attributes, self.get_parameters(), self._saved_variables())

    def _saved_attributes(self, exclude: Iterable[str] = (), include: Iterable[str] = ()) -> dict[str, Any]:
        """:return: What a file has of the model besides tensors, by name."""
        names, variables = self._get_torch_save_params()
        left_out = {*self._excluded_save_params(), *exclude}.difference(include)
        left_out.update(name.split(".")[0] for name in names + variables)
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def _saved_variables(self) -> dict[str, Any]:
        """:return: Tensors that a file has besides state dicts, by name."""
        return {name: recursive_getattr(self, name) for name in self._get_torch_save_params()[1]}

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "lr_schedule",
            "_schedules",
            "_engine",
            "_engine_reason",
            "_loads_sb3",
            "_warned_of_early_end",
            "_warned_of_missing_kl",
            "_n_envs_before",
            "_resumed",
        ]

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trust_pickle: TrustPickle = None,
        **kwargs: Any,
    ) -> Self:
        """
        Load a model that ClipPPO or SB3's PPO saved, without running code that the file brings or names.

        What a file of SB3's PPO does not hold takes the value of :data:`SB3_EQUIVALENT`, so that training goes on as
        SB3's PPO would; a warning names those values.

        :param path: Zip file, with or without its suffix, or an open binary file.
        :param env: Environment to go on in; it may differ in its number of copies. None: the model can only predict.
        :param device: PyTorch device, or "auto".
        :param custom_objects: Values to take instead of the file's, by attribute; the file's are not looked at.
        :param print_system_info: Whether to print the versions of the packages then and now.
        :param force_reset: Whether to reset the environments before training.
        :param trust_pickle: True: the file may run any code. False: it may use classes of Gymnasium, NumPy, torch, SB3
            and this package that are known to do no harm. Classes and functions: it may use these, too. None: as the
            environment variable ``SB3_CLIPVF_TRUST_PICKLE`` says, "1" or "0", which is the default.
        :param kwargs: Arguments of the constructor to change.
        :return: The model.
        :raises UnsafeFileError: If the file needs what it may not use.
        :raises ValueError: If the file is no model, is damaged, does not fit into memory, or holds a value that cannot
            be read with the packages as they are here; or PyTorch knows no such device.
        :raises RuntimeError: If the weights do not fit the policy that the file describes.
        :raises FileNotFoundError: If there is no file.
        """
        check_device(device)
        trust = trust_of(trust_pickle)
        file = read_model(path)
        replaced = dict(custom_objects or {})
        check_model(file, cls, trust, replaced)
        kwargs = values_to_load(file.data or {}, kwargs, replaced, cls)
        # Built anew in any case; and SB3 compares the policy's arguments with the file's.
        replaced = {"lr_schedule": None, **{key: kwargs[key] for key in kwargs if key != "policy_kwargs"}, **replaced}
        with same_spaces(), network_bound(file, trust):
            model = super().load(
                file.stream(),
                env=env,
                device=device,
                custom_objects={**file.unpickled(trust, replaced), **replaced},
                print_system_info=print_system_info,
                force_reset=force_reset,
                **kwargs,
            )
        vars(model).pop(NOTE, None)
        model._n_envs_before = (file.data or {}).get("n_envs")
        return model

    def set_parameters(
        self,
        load_path_or_dict: str | pathlib.Path | io.BufferedIOBase | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Take over weights and the optimizer's state.

        :param load_path_or_dict: Zip file of a model, of which only tensors are read, or what ``get_parameters`` gave.
        :param exact_match: Whether all of them must be there. False takes over what there is.
        :param device: PyTorch device, or "auto".
        :raises UnsafeFileError: If the file holds more than tensors in the place of weights.
        :raises ValueError: If the file is no model, is damaged or does not fit into memory, or a name is unknown or,
            with ``exact_match``, missing.
        """
        parameters: Any = load_path_or_dict
        if not isinstance(parameters, dict):
            parameters = read_model(parameters, needs_data=False).stream()
        super().set_parameters(parameters, exact_match=exact_match, device=device)

    @property
    def remaining_timesteps(self) -> int:
        """Environment steps up to the end of the training that was last begun, at least 0."""
        return max(0, self._total_timesteps - self.num_timesteps)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], env: GymEnv, device: th.device | str = "auto", **kwargs: Any) -> Self:
        """
        Go on with an interrupted training from a checkpoint of ``TrainingCheckpoint``.

        ``model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=...)`` then ends, on the CPU, with
        the weights of the training that was not interrupted, to the last bit; the checkpoint names what keeps it from
        that. Pass the callbacks that the training had: theirs is part of the state.

        :param path: A checkpoint, or the folder of them: the newest whole one is taken.
        :param env: Environments, built as those of the training. They are reset, then put where they were.
        :param device: PyTorch device, or "auto".
        :param kwargs: Further arguments of :meth:`load`, such as arguments of the constructor to change.
        :return: The model.
        :raises FileNotFoundError: If there is no checkpoint.
        :raises ValueError: If all are damaged, or the environments are built differently; or the file is a model
            without the state of its training, as ``save`` writes it.
        """
        from sb3_clipvf.checkpoint.resume import resume

        return resume(cls, path, env, device, **kwargs)  # type: ignore[type-var]

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        initialised = super()._init_callback(callback, progress_bar)
        if self._resumed is not None:
            from sb3_clipvf.checkpoint.resume import take_over

            take_over(cast("ClipPPO", self), initialised)
        return initialised
