"""Pure functions on tensors: gathers over ranks, sums over pairs. No state, no flags, no files."""
