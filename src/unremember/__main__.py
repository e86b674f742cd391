"""`python -m unremember`."""

from unremember.cli import main

main()
