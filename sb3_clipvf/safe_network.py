"""A bound on the network that a file describes, by the weights that it holds: a line of JSON can ask for any size."""

import zipfile
from typing import Any

import torch as th
from torch.overrides import TorchFunctionMode

from sb3_clipvf.safe_files import ModelFile

ROOM = 64 * 2**20
"""Bytes that a policy may take besides four times those of the file's weights: buffers are no weights."""

_LEAST = 1024  # a tensor takes this, however small it is; in a file some hundred bytes
_FACTORIES = frozenset({th.empty, th.zeros, th.ones, th.full, th.rand, th.randn, th.eye, th.arange})


class NetworkBound(TorchFunctionMode):
    """
    Refuse tensors, while a policy is built, that are larger together than the file's weights give reason for.

    :param file: The model's file.
    """

    def __init__(self, file: ModelFile) -> None:
        super().__init__()
        with zipfile.ZipFile(file.stream()) as archive:
            self._weights = sum(info.file_size for info in archive.infolist() if info.filename == "policy.pth")
        self._name, self._taken = file.name, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """
        Count what is made, before it takes memory.

        :param func: Of torch.
        :param types: Of its arguments.
        :param args: Its arguments.
        :param kwargs: Its keyword arguments.
        :return: Its result.
        :raises ValueError: If it is too much.
        """
        kwargs = kwargs or {}
        if func in _FACTORIES and "out" not in kwargs:
            self._taken += max(_LEAST, func(*args, **{**kwargs, "device": "meta"}).nbytes)
            if self._taken > ROOM + 4 * self._weights:
                raise ValueError(
                    f"The policy in {self._name} must be no larger than its weights, got a network of more than "
                    f"{self._taken / 1e6:.0f} MB and weights of {self._weights / 1e6:.1f} MB. Load it only if you know "
                    "where it comes from, with trust_pickle=True."
                )
        return func(*args, **kwargs)
