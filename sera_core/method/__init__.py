"""SeRA's mathematics and the evidence about a round: arrays in, arrays out. No torch, no files.

Not used by the loop yet: features, panel, estimates, sides, reliance, correlation, selected, best, deciding,
standing and alarm. The loop decides with convergence and diagnostics.
"""
