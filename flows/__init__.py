"""SeRA as Prefect flows: start reading in sera.py (all rounds) and round.py (one round)."""
