"""Prefect tasks: bind each stage's computation to the store, part by part."""
