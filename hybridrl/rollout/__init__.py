"""The sources of responses: a vLLM engine, or the data's own responses."""
