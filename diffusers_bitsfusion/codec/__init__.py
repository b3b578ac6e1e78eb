"""Numbers only: grids, scales, packed forms, entropy coding. Imports torch, numpy and zstandard, never diffusers."""
