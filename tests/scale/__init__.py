"""`python -m tests.scale`: what sera-flow does at sizes that a test does not reach."""
