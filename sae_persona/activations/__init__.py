"""Texts to streamed residual activations."""
