"""Independent judges of answers: which of two answers to a prompt is better."""
