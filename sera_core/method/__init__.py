"""Evidence about a round as mathematics: features, reliance, decisions, the alarm. Arrays in, arrays out."""
