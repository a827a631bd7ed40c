"""What a user runs besides training."""
