"""`python -m memcircuits`."""

from memcircuits.cli import main

main()
