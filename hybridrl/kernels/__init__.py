"""The head pass: loss and gradients at the logits, chunk by chunk of tokens, so that the logits of
all tokens are never in memory at once.
"""
