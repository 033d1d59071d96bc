"""
What the loop of ``tensor_collection`` does in each kind of rollout.

- ``base``: the interface, and the episodes of tensor environments;
- ``host``: tensor environments on the CPU;
- ``device``: rollouts that are kept on a GPU;
- ``whole``: whole steps as one CUDA graph.
"""
