"""A run being worked on: opened and named, its rounds computed step by step, each closed by a manifest."""
