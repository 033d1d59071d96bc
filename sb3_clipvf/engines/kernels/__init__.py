"""
Compiled kernels in float32: the update and the rollout's forward pass of a plain MLP policy, for the native engine; the
losses' gradients, the optimizer's step and the drawing of actions, for autograd with these compiled.

They work on the policy's and the optimizer's own memory, which they get as addresses (``memory``), and restate the
mathematics of :mod:`sb3_clipvf.objectives`; ``tests/test_engines.py`` holds them to it. From the inside out:
``elementwise`` (exp, tanh, activations), ``network`` (forward and backward pass), ``heads`` (action distributions),
``losses``, ``adam``, ``data`` (what kernels are given), ``gsde`` (state-dependent spread and noise), ``minibatch``
(losses and the optimizer's step), ``sync`` (two threads side by side), ``update`` and ``rollout``, and what Python
calls in ``entry``.

Importing a module of it imports numba; only the engines that call kernels do.
"""
