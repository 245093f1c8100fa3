"""Advantage estimators: what is left of a token's return once a baseline is subtracted, one file
each.
"""
