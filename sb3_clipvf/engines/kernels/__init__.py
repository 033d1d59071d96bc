"""
Compiled kernels in float32, for the CPU.

The native engine runs whole updates and the rollout's forward pass of MLP policies in kernels. The fused engine leaves
the networks to torch, and uses kernels for the losses' gradients, the optimizer's step and the sampling of actions.

Kernels work in place on the memory of the policy and the optimizer. They restate formulas, each with a parity test
that its module names. From the innermost modules to the outermost:

- ``memory``, ``inputs``, ``totals``: tensors by address, arguments from Python, indices of statistics;
- ``elementwise``, ``products``, ``mlp``: activations; products that are added; forward and backward pass of a network;
- ``gsde``, ``action_distributions``: state-dependent exploration; log-probability, entropy, exact KL, samples;
- ``losses``, ``adam``: surrogate and value loss; the optimizer's step and the bound on the gradient norm;
- ``minibatch``, ``barrier``, ``update``: one minibatch; threads side by side; all epochs of an update;
- ``acting``, ``gae``: actions and values of a rollout's step; advantages and returns;
- ``entry``, ``warmup``: kernels that Python calls; compiling or loading them before they are needed.

These modules import numba, so only the engines that call kernels import them.
"""
