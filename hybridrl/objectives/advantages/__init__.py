"""Advantage estimators: a token's return minus a baseline, one file each."""
