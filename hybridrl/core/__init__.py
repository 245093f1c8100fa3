"""What every package may use: errors, crash-safe files, secret redaction, failpoints."""
