"""What proposes candidates and learns from their scores: pure functions that know nothing of models or rewards.

wavelet   `split`, `merge`: the low band of a noise tensor, which is what is searched
cem       `init -> (ask -> tell) * generations`: the Cross-Entropy Method
"""
