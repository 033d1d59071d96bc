"""The matrix products of an update alone: a bound for engines that compute them with this BLAS."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn

from sb3_clipvf.common.resources import usable_cores

SECONDS = 0.5
"""How long the products of a minibatch are repeated on each number of threads."""


def products_seconds(model: Any, threads: int | None = None) -> float:
    """
    Return the seconds of the products of one update: forward, for the weights' gradients, and for the inputs'.

    torch computes them one after the other, with its BLAS and its convolutions, into allocated memory, on a number of
    threads (None: the fastest). The model has SB3's interface, and has collected a rollout.
    """
    products = layer_products(model)
    before = th.get_num_threads()
    try:
        counts = {1, usable_cores()} if threads is None else {threads}
        fastest = min(_seconds(products, count) for count in counts)
    finally:
        th.set_num_threads(before)
    n_minibatches = math.ceil(model.n_steps * model.n_envs / model.batch_size) * model.n_epochs
    return float(fastest * n_minibatches)


def layer_products(model: Any) -> list[Callable[[], Any]]:
    """Return a function for each pass of a minibatch through a linear or convolutional layer."""
    batch = next(model.rollout_buffer.get(model.batch_size))
    passes: list[tuple[Any, th.Tensor]] = []
    layers = [layer for layer in model.policy.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(lambda layer, rows: passes.append((layer, rows[0]))) for layer in layers]
    try:
        model.policy.evaluate_actions(batch.observations, batch.actions)
    finally:
        for hook in hooks:
            hook.remove()
    return [(_linear if isinstance(layer, nn.Linear) else _convolution)(layer, rows) for layer, rows in passes]


def _linear(layer: nn.Linear, rows: th.Tensor) -> Callable[[], Any]:
    needs_input = rows.requires_grad  # observations have no gradient
    weight, rows = layer.weight.detach(), rows.detach()
    outputs = rows @ weight.T
    gradient, weight_gradient, input_gradient = th.ones_like(outputs), th.empty_like(weight), th.empty_like(rows)

    def multiply() -> None:
        th.mm(rows, weight.T, out=outputs)
        th.mm(gradient.T, rows, out=weight_gradient)
        if needs_input:
            th.mm(gradient, weight, out=input_gradient)

    return multiply


def _convolution(layer: nn.Conv2d, pictures: th.Tensor) -> Callable[[], Any]:
    needs_input = pictures.requires_grad
    weight = layer.weight.detach()
    # oneDNN is fastest in this format.
    pictures = pictures.detach().contiguous(memory_format=th.channels_last)
    shape = (layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)
    outputs = th.ops.aten.convolution(pictures, weight, None, *shape)
    gradient = th.ones_like(outputs)

    def convolve() -> None:
        th.ops.aten.convolution(pictures, weight, None, *shape)
        th.ops.aten.convolution_backward(gradient, pictures, weight, None, *shape, (needs_input, True, False))

    return convolve


@th.no_grad()
def _seconds(products: list[Callable[[], Any]], threads: int) -> float:
    th.set_num_threads(threads)
    for multiply in products:
        multiply()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        for multiply in products:
            multiply()
        count += 1
    return (time.perf_counter() - started) / count
