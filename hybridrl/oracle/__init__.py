"""The oracle: the production gradient of every method, compared with exact enumeration."""
