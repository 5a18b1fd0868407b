"""`python -m fromzero`: the command line, where the command itself is not on the path."""

from fromzero.cli import main

main()
