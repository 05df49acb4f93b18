"""Compiled functions and launch records that the implementations of attention share."""
