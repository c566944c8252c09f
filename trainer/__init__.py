"""Store in, Raptor out."""
