"""`python cli.py COMMAND` from a checkout: the same as `python -m mint COMMAND`."""

from mint.commands import main

if __name__ == "__main__":
    main()
