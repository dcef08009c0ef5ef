"""`python -m robsparse` is the command `robsparse`."""

import sys

from robsparse.cli.main import main

sys.exit(main())
