"""Everything that knows a parameter's name: what is published, saved, loaded and exported."""
