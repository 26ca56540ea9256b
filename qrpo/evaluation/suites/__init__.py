"""Public test suites, read from local files in the formats that they are published in.

    alpaca_eval    AlpacaEval 2: a judge's preference over a baseline, and the same at equal length, by the `alpaca-eval` package
    leetcode       LeetCodeDataset: tests passed and pass@1, in the sandbox

`completions` draws a model's completions with the engines of the pipeline.
"""
