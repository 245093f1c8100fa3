"""Where prompts come from: generators, files, and the cursor over them."""
