"""`python -m nbdvvol` is the `nbdvvol` command."""

from nbdvvol.cli.main import main

if __name__ == "__main__":
    main()
