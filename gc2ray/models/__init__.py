"""Model architectures, how they are loaded, and what they cost."""
