"""Measurements of this package against the published procedure and against its own formulas."""
