"""The fault matrix, done to real runs of tiny models on one machine; what was found is kept in
results/.
"""
