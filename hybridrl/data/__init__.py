"""The sources of prompts: generators, files, and the cursor over them."""
