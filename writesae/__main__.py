"""`python -m writesae`: the `writesae` command."""

import sys

from .cli import main

sys.exit(main())
