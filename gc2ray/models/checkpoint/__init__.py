"""A model's files: fetched, and held against each other before they are loaded."""
