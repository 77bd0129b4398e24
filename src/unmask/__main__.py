"""`python -m unmask`: what torchrun starts."""

from unmask.cli.main import main

main()
