"""What people see of a run: cards, events, log lines and progress in Prefect, tables and the report."""
