"""What every other package may use: errors, files that survive a crash, redaction of secrets,
failpoints.
"""
