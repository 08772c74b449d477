"""Sparse autoencoders: parameters, training, files, quality."""
