"""The student: its learner ranks, the module that DeepSpeed trains, and the optimizer's state."""
