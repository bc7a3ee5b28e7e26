"""Transcripts of recordings: clips of one engine batch, joined with their times, and written in several formats."""
