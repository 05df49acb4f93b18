"""Machinery shared by every op; it knows no operation."""
