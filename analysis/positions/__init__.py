"""What positional encodings and attention learn of the places of patches, after Jelassi et al. 2022."""
