"""Runs: open and name a run, run its rounds, write a manifest for each."""
