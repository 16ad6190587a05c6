"""The step functions of a round. Each reads its inputs from the store and writes one step."""
