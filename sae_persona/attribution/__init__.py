"""Which latents go with which persona, and how sure that is."""
