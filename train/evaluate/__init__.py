"""Measure what an eraser removes and what it leaves."""
