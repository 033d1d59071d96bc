"""
Compiled kernels in float32, for the CPU.

The native engine runs whole updates and the rollout's forward pass of MLP policies in kernels. The fused engine leaves
the networks to torch, and uses kernels for the losses' gradients, the optimizer's step and the sampling of actions.

Kernels work in place on the memory of the policy and the optimizer. They restate formulas, each with a parity test
that its module names. From the innermost modules to the outermost:

- ``memory``: tensors by address;
- ``inputs``: arguments from Python;
- ``totals``: indices of statistics;
- ``elementwise``: exp, tanh and activations;
- ``products``: matrix products that are added;
- ``mlp``: forward and backward pass of a network;
- ``gsde``: state-dependent exploration;
- ``action_distributions``: log-probability, entropy, exact KL and samples;
- ``losses``: surrogate and value loss;
- ``adam``: the optimizer's step and the bound on the gradient norm;
- ``minibatch``: the loss of one minibatch, and whether it takes a step;
- ``barrier``: a barrier for threads;
- ``update``: all epochs of an update;
- ``acting``: actions and values of a rollout's step;
- ``gae``: advantages and returns;
- ``entry``: kernels that Python calls;
- ``warmup``: compiling or loading them before they are needed.

These modules import numba, so only the engines that call kernels import them.
"""
