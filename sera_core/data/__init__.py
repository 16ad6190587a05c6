"""Preference data: from a source's rows to checked pairs, splits and token ids."""
