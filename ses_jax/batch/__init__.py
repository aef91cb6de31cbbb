"""Searches over many prompts, in one process or in many, that survive being killed.

run          `search_many`
prompts      prompt files as rows
run_folder   what a run leaves on disk, and what of it is finished
processes    which of many processes this one is
progress     what a run shows
"""
