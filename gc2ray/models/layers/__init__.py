"""Layers that run faster than the stock ones: attention, linear."""
