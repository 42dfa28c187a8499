"""Frozen first stages: pixels and words <-> what networks eat."""
