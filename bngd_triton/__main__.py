"""`python -m bngd_triton`."""

import sys

from .cli import main

sys.exit(main())
