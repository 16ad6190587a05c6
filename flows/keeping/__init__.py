"""Keeping a store: verified, compared, and rid of what nothing refers to."""
