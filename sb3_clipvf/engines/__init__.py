"""How a policy acts and is updated. Engines differ in speed, never in meaning; ``autograd`` is the reference."""
