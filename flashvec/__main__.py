"""`python -m flashvec`: the command, where its script is not on the path."""

from flashvec.runtime.cli import main

main()
