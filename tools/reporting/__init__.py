"""What `tools/report.py` puts together: runs as a table, compared, with curves, routing, maps and cost, on one page."""
