"""Questions about what a fine-tune did to a persona: made, watched, foreseen and undone."""
