"""
Engines act with a policy and update it. ``autograd`` is the reference; others differ in speed and rounding.

The engines:

- ``interface``: what an engine has;
- ``selection``: the choice of the engine;
- ``device``: the rule of ``device="auto"``;
- ``autograd``: the reference, by PyTorch's automatic differentiation;
- ``fused``: networks in PyTorch, the rest in kernels;
- ``native``: whole updates in kernels;
- ``cuda_graph``: updates and rollouts as CUDA graphs;
- ``kernels``: compiled functions of native and fused;
- ``cuda``: captured operations of cuda_graph;
- ``images``: the extraction of features in fused;
- ``native_minibatches``: single minibatches of native.

Updates:

- ``epochs``: the loop over epochs and minibatches;
- ``reduction``: minibatches that several processes share;
- ``recognition``: whether classes have their original code;
- ``support``: whether an engine can run a policy;
- ``binding``: tensors that kernels change in-place;
- ``bridge``: settings, statistics and actions for kernels;
- ``division``: parts of an update for threads;
- ``threads``: the number of threads, and their pool.

Rollouts:

- ``rollout_writer``: steps that kernels write into the buffer;
- ``device_buffer``: the buffer on a device;
- ``env_actions``: actions for the environments;
- ``callback_access``: whether callbacks may read the policy's actions.
"""
