"""Flax NNX decoders."""
