"""The measured problems, a module for each family of ops."""
