"""SeRA's mathematics and the evidence about a round: arrays in, arrays out. No torch, no files."""
