"""Scores of features and of models."""
