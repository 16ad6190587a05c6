"""Safety: escaped text, URLs without secrets, memory limits, no orphaned processes."""
