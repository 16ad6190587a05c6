"""SeRA's mathematics: arrays in, arrays out. No torch, no files."""
