"""The head pass: loss and gradients at the logits, chunk by chunk, without storing the whole
vocabulary.
"""
