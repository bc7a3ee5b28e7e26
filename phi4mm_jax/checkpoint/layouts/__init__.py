"""Tables of names: one layout of a checkpoint a file."""
