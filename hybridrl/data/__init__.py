"""Where prompts come from: generators, files, and the cursor that walks over them."""
