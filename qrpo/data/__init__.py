"""Prompts and their text formats.

sources    rows of files (any fsspec URL) and Hugging Face datasets
prompts    dataset rows to prompts, and the train/eval split
chat       messages to token ids, by the model's chat template
"""
