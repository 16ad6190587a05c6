"""A run in a notebook: tables, comparisons, figures. Only `figures` and `panels` need matplotlib."""
