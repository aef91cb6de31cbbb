"""What proposes candidates and learns from their scores: pure functions that know nothing of models or rewards.

registry    searchers by name, with their options
searcher    what a searcher is: `init -> (ask -> tell) * generations`
ses         Spectral Evolution Search: the Cross-Entropy Method over the low band
zero_order  local mutation of the best
gradient    ascent along the reward's gradient
best_of_n   independent noises
evosax      evolution strategies of that package, by name
space       what is searched: the low band, or whole noise
options     what an option of a searcher is
cem         the Cross-Entropy Method
elites      the best so far
wavelet     `split`, `merge`: the low band of a noise tensor
"""
