"""Measurements of speed that anyone can repeat."""
