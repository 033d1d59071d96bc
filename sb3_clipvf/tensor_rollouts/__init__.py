"""What the loop of ``tensor_collection`` does in each kind of rollout."""
