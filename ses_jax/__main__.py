"""`python -m ses_jax` is the same as `ses-jax`."""

import sys

from ses_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
