"""What the shell has beside the calls of Python.

doctor   what this machine has, and what is missing
dry_run  what a command would do
words    options that stand for others: -q, --like
"""
