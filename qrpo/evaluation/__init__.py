"""Evaluate models on held-out prompts.

summary         the policy and other models against the reference, from a table of scored samples
statistics      means, win rates, KL, and intervals over prompts and seeds
comparison      the best of several models or settings, chosen on one half of the prompts
length_control  rewards at equal length
diversity       how different the samples of one prompt are
suites          AlpacaEval 2 and LeetCodeDataset
"""
