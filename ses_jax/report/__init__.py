"""What people look at after a search: pages of HTML, charts and grids, made by pure functions from plain values.

page     one search as a page
gallery  a run over many prompts as a page
charts   lines as SVG
grid     previews side by side
curves   the numbers behind the charts
html     pieces of pages, their style and their script
"""
