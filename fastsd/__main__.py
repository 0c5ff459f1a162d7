"""`python -m fastsd`: the command line."""

from fastsd.cli import main

if __name__ == "__main__":
    main()
