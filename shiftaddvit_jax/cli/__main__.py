"""``python -m shiftaddvit_jax.cli`` is ``shiftaddvit``."""

import sys

from shiftaddvit_jax.cli import main

sys.exit(main())
