"""Command line of the installed package."""
