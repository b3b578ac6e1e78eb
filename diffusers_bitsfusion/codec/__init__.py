"""Numbers to bytes and back: grids, scales, digits, entropy coding, and what a checkpoint says of itself."""
