"""`python -m ummunotify`."""

from .cli import main

main(prog_name="ummunotify")
