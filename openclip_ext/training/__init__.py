"""The training loop on Accelerate, and what surrounds it."""
