"""Volumes larger than memory, or than what a network was trained on. README.md is the guide."""
