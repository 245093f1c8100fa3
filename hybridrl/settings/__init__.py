"""Every setting with its default and meaning, checks across settings, and their composition."""
