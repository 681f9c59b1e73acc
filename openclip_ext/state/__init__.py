"""What outlives a step. Everything here is a buffer, so `state_dict()` is the whole truth."""
