"""Edits of a model's residual stream through latents."""
