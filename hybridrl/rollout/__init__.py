"""Where responses come from: a vLLM engine, or the data's own responses."""
