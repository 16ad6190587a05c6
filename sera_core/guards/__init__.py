"""Protection for the user: text shown without effect, URLs without secrets, limits, no orphaned processes."""
