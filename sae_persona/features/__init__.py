"""What each latent does on a corpus: statistics and contexts."""
