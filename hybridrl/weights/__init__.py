"""Publishing, saving, loading and exporting the student's weights by their names."""
