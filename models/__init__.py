"""Networks only: each file holds one architecture as a frozen config, pure functions and thin Linen modules.

Nothing outside this package sees Flax: callers pass a params tree and a config to plain functions.
"""
