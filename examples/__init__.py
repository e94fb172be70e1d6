"""Projects to fork."""
