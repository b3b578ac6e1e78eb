"""Sensitivity of each layer, and the allocation of bits by it (paper, sections 4 and 5)."""
