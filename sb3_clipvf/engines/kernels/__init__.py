"""
Compiled kernels of the native engine: the update and the rollout's forward pass of a plain MLP policy, in float32.

They work on the policy's and the optimizer's own memory, which they get as addresses (:mod:`.memory`), and restate the
mathematics of :mod:`sb3_clipvf.objectives`; ``tests/test_engines.py`` holds them to it. From the inside out:
``elementwise`` (exp, tanh, activations), ``network`` (forward and backward pass), ``heads`` (action distributions),
``losses``, ``adam``, ``sync`` (two threads side by side), and the entry points in ``entry``.

Importing it imports numba; nothing but :mod:`sb3_clipvf.engines.native` does.
"""
