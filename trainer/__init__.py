"""Trains SoME language models: data, the distributed engine, the loop, checkpoints and metrics."""
