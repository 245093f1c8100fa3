"""The student: its learner ranks, the module that DeepSpeed trains, and its optimizer's state."""
