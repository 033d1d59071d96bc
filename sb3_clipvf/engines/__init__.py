"""
Engines act with a policy and update it. ``autograd`` is the reference; others differ in speed and rounding.

The engines:

- ``interface``, ``selection``, ``device``: what an engine has; the choice of the engine; the rule of ``device="auto"``;
- ``autograd``, ``fused``, ``native``, ``cuda_graph``: the engines of these names;
- ``kernels``, ``cuda``: compiled functions of native and fused; recorded operations of cuda_graph;
- ``images``, ``native_minibatches``: the extraction of features in fused; single minibatches of native.

Updates:

- ``epochs``, ``reduction``: the loop over epochs and minibatches; minibatches that several processes share;
- ``recognition``, ``support``: whether classes have their original code; whether an engine can run a policy;
- ``binding``, ``bridge``: tensors that kernels change in-place; settings, statistics and actions for kernels;
- ``division``, ``threads``: parts of an update for threads; the number of threads, and their pool.

Rollouts:

- ``in_place``, ``device_buffer``: steps that kernels write into the buffer; the buffer on a device;
- ``env_actions``, ``callback_access``: actions for the environments; which callbacks read the policy's actions.
"""
