"""The oracle: compares the production gradient of every method with exact enumeration."""
