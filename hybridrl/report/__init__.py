"""Writes the report of a run as a page and a picture, and the comparison of several runs."""
