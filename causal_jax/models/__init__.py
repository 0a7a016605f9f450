"""Models: the decoder (more to come)."""
