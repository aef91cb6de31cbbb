"""What the shell has beside the calls of Python.

commands  convert, models, show, export, doctor, studio
doctor    what this machine has, and what is missing
options   the options of commands, and arguments made of them
dry_run   what a command would do
errors    what is said of what went wrong
words     options that stand for others: -q, --config, --like; and prompts from files
"""
