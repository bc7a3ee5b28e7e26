"""Files, checks and programs: nothing of the model."""
