"""Settings that a user writes, as plain data: the config, recipes of bits, and the settings of calibration."""
