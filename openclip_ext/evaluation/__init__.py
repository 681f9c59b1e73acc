"""Scores of a model: zero-shot classification and retrieval."""
