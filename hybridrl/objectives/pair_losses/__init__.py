"""Losses on pairs of responses, a chosen and a rejected one, one file each.

s_w and s_l are the scores that a loss compares: log pi - log pi_ref of the chosen (w) and of the
rejected (l) response, or log pi alone where the loss has no reference model.
"""
