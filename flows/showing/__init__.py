"""What a person sees of a run: cards, events, log lines and progress in Prefect, tables and the report."""
