"""`python -m console` is `kdconsole`."""

from console.cli import main

if __name__ == "__main__":
    main()
