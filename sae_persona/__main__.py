"""`python -m sae_persona` is the command line."""

from sae_persona.cli import main

main()
