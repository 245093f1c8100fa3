"""Everything that depends on parameters' names: publishing, saving, loading and exporting them."""
