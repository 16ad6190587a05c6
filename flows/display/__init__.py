"""Display of a run: cards, events, logs and progress in Prefect, and the HTML report."""
