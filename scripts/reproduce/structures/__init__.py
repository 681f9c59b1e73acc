"""`scripts/reproduce_structures.py`: a base loss with terms that shape features, scored in four ways."""
