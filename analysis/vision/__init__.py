"""What vision transformers see: sub-layers, localisation, probes, receptive fields, skips (Raghu et al. 2021)."""
