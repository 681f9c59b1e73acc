"""Additive terms, one file each, for any base loss."""
