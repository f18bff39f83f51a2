"""A backend from outside, as small as one can be: one objective, two dtypes, one file of work."""
