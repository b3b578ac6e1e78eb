"""Packing of a float model: the plan of its layers' bits, and the replacement of its layers."""
