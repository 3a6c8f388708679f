"""`python -m featherweight` is the command `feather`."""

from featherweight.cli.main import main

if __name__ == "__main__":
    main()
