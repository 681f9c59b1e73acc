"""What `scripts/reproduce_*.py` are made of: the experiments of the papers whose methods are losses and terms here."""
