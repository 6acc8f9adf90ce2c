"""`python -m dengine` is `dengine`."""

import sys

from dengine.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
