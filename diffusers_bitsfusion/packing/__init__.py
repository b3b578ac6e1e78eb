"""From a float model to a packed one: which layers get which bits, and replacing them."""
