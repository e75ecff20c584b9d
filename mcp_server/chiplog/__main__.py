"""`python -m chiplog` is the command `chiplog`."""

from chiplog.cli import main

main()
