"""The oracle: every method's gradient, from the production code path, against exact enumeration of
a tiny language model.
"""
