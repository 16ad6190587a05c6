"""The steps of a round, one capability a file: each reads refs from the store and writes one step."""
