"""
Operations that the engine ``cuda_graph`` captures as CUDA graphs, which one call replays on a GPU.

They read and write *static* tensors, which stay at fixed addresses, as CUDA graphs need, and copy no number to the
host. On the CPU they run one by one, which tests compare with the other engines. From the innermost modules to the
outermost:

- ``static_distributions``: action distributions of updates;
- ``static_policy``: the policy's forward pass of updates;
- ``static_loss``: the loss of minibatches;
- ``static_step``: their gradients and Adam's steps, and the update of these;
- ``sampling``: the policy's step in a rollout;
- ``rollout_step``: the whole step with environments and buffer;
- ``capture``: the capture of CUDA graphs.
"""
