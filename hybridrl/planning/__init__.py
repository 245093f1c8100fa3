"""What a run needs before anything starts: memory, bytes on each edge, disk and time, by arithmetic
on its settings and the configs of its models.
"""
