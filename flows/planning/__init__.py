"""Plan a run: its steps and their cost."""
