"""The demo: scenes with headroom for a search, their judge, and the training of its networks."""
