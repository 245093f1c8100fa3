"""Python imports this file when a process starts whose PYTHONPATH has this folder, in a run of
`tools/gpu_lines`; see gpu_coverage/recording.py.
"""

from gpu_coverage.recording import install

install()
