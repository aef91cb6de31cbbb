"""A local page for people who do not write code, on Gradio (`pip install 'ses_jax[studio]'`).

page      the page itself
sessions  a search that tells of itself while it runs, and can be stopped
"""
