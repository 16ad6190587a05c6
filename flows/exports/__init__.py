"""Handing a policy on: its lineage, its model card, the Hugging Face hub."""
