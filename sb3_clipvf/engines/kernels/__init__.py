"""
Compiled kernels in float32, for the CPU.

The native engine runs whole updates and the rollout's forward pass of an MLP policy by them; the fused engine leaves
networks to torch, and takes from here the losses' gradients, the optimizer's step and the drawing of actions.

Kernels work in place on the policy's and the optimizer's own memory. They restate formulas, each under a parity test
that its module names. From the inside out:

- ``memory``, ``inputs``, ``totals``: tensors by address, what Python passes in, where statistics stand;
- ``elementwise``, ``mlp``: exp, tanh and activations; forward and backward pass of a network;
- ``gsde``, ``action_distributions``: state-dependent exploration; log-probability, entropy, exact KL, samples;
- ``losses``, ``adam``: surrogate and value loss; the optimizer's step and the bound on the gradient norm;
- ``minibatch``, ``barrier``, ``update``: one minibatch; two threads side by side; all epochs of an update;
- ``acting``, ``gae``: actions and values of a rollout's step; advantages and returns;
- ``entry``, ``warmup``: what Python calls; compiling or loading it before it is needed.

Importing a module of it imports numba; only the engines that call kernels do.
"""
