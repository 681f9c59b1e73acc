"""Scores of a model: zero-shot classification, retrieval, and probes of its features."""
