"""Layers: pure modules that the families share. They know no family, no file and no recipe."""
