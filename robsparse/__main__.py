"""`python -m robsparse` is the command `robsparse`."""

import sys

from robsparse.cli import main

sys.exit(main())
