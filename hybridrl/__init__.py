"""hybridrl: distributed post-training by one objective, dense imitation plus sparse reward."""

__version__ = "0.1.0"
