"""Slow, obviously right versions of what the project computes, written from the spec alone and never from the code."""
