"""`scripts/reproduce_gradient_bias.py`: which losses reach the optimum from small batches."""
