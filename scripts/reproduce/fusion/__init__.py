"""`scripts/reproduce_fusion.py`: a fusion model with a base loss and with terms, on generated scenes."""
