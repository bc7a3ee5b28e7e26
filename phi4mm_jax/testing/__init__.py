"""Goldens, and comparisons with them."""
