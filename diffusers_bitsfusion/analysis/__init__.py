"""How many bits each layer gets (paper, sections 4 and 5)."""
