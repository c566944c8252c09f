"""Layers of several encoders, side by side and against each other (the Raptor paper's first figure)."""
