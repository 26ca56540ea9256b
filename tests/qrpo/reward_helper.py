"""A module that reward_functions.py imports."""

VALUE = 7.0
