"""`python -m tests.benchmarks.speed`: speed and exactness, beside a peer or the machine's peak."""
