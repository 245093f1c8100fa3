"""From scored chunks to one forward pass: groups, columns of response tokens, micro-batches."""
