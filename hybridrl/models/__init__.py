"""Models as Hugging Face folders: the tiny shipped ones, loading, export, and the SFT that made
them.
"""
