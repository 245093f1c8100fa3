"""Language models as Hugging Face folders: loading, checks, and the tiny built-in models."""
