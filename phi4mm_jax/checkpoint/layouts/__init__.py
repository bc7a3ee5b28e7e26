"""Weight tables, one file per checkpoint layout."""
