"""Export a policy: lineage, model card, Hugging Face hub."""
