"""SeRA's mathematics and the evidence about a round: pure functions on numpy arrays, no torch, no files."""
