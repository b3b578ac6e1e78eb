"""What a user writes, as plain data: the config, recipes of bits, and what to calibrate with."""
