"""The report's page in a real browser, opened from a file and without a network."""
