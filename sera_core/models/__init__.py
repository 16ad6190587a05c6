"""Policies: sources, folders, weights, and log-probabilities of responses."""
