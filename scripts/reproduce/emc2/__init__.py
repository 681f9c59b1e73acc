"""`scripts/reproduce_emc2.py`: how far the gradient of the loss over all images falls with batches of four."""
