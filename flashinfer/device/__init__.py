"""Triton functions used unchanged by two or more ops."""
