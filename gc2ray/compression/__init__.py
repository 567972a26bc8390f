"""Which visual tokens to keep, and how what is kept is packed."""
