"""The commands, thin: read options, call a stage, show what came."""
