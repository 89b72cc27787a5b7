"""`python -m manyhands` is the command `manyhands`."""

from manyhands.ui.main import main

if __name__ == "__main__":
    main()
