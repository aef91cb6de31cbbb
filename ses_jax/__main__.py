"""`python -m ses_jax` is the same as `ses-jax`."""

import sys

from ses_jax.cli import main

sys.exit(main())
