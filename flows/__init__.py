"""SeRA as Prefect flows: start reading in sera.py (all rounds) and round.py (one round)."""

import gc

# torch, transformers and Prefect make half a million objects when they are imported. By default the garbage
# collector walks through them 1,900 times and frees next to nothing: a sixth of a process's start.
gc.set_threshold(50_000)
