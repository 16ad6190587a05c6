"""`python -m tests.gpu`: speed and exactness of the engines, and a small run, on the device that is there."""
