"""Tools for a whole store: verify, diff, and delete unreferenced steps."""
