"""`python -m ses_jax.convert SOURCE OUT`: the same as `ses-jax convert`."""

import sys

from ses_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
