"""``python -m shiftaddvit_jax`` is ``shiftaddvit``."""

import sys

from shiftaddvit_jax.cli import main

sys.exit(main())
