"""Linear probes: a small readout trained on the frozen last state of a teacher or of a Raptor."""
