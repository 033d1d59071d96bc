"""
Operations that the engine ``cuda_graph`` records, so that one call repeats them on a GPU.

They read and write the same memory each time, and read nothing from the device. On the CPU they run one by one, which
tests compare with the other engines. From the innermost modules to the outermost:

- ``static_distributions``, ``static_policy``: action distributions and forward pass of updates;
- ``static_loss``, ``static_step``: loss of minibatches; their gradients and Adam's steps, and the update of these;
- ``sampling``, ``rollout_step``: the policy's step in a rollout; the whole step with environments and buffer;
- ``recorder``: recording and repeating.
"""
