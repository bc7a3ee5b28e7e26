"""Checkpoints: weight tables, and readers and writers of files."""
