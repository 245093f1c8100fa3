"""A finished run as one page, one picture and a comparison with other runs."""
