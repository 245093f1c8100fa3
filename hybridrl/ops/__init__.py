"""Pure tensor mathematics: it needs torch alone, reads no configuration and starts no processes.

Letters in signatures: N sequences, K siblings of a prompt, T response positions, R response tokens
of a batch in one row each, V vocabulary, H hidden size. p is the student's distribution, q a
teacher's, y the drawn token.
"""
