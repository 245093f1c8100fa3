"""Every setting with its default and meaning, the checks across settings, and how they are
composed.
"""
