"""A second small pipeline to measure quantization on, trained on an emoji font that nobody here drew."""
