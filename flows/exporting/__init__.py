"""Handing a policy on: where it comes from, its card, the hub."""
