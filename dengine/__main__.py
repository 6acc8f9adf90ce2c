"""The command `dengine`, and `python -m dengine`."""

import sys


def main() -> int:
    """Run the command line of this process and return its exit code."""
    try:
        from dengine.cli.main import main as run

        return run()
    except KeyboardInterrupt:  # while that is loading, which takes a moment
        return 130


if __name__ == "__main__":
    sys.exit(main())
