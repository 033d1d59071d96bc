"""How one update runs. Engines differ in speed, never in meaning; ``autograd`` is the reference."""
