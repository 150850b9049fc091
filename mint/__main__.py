"""`python -m mint COMMAND`: hands over to `commands`."""

from .commands import cli, main

__all__ = ["cli", "main"]

if __name__ == "__main__":
    main()
