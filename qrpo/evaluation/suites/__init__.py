"""Public evaluation suites, read from local files in their published formats.

alpaca_eval    AlpacaEval 2: win rate and length-controlled win rate, by the `alpaca-eval` package
leetcode       LeetCodeDataset: tests passed and pass@1, in the sandbox
completions    a model's completions, sampled with the pipeline's engines
files          the suites' files
"""
