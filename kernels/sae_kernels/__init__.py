"""Triton kernels and their plain-torch oracles; knows nothing of sae_persona."""
