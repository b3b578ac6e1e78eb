"""A small text-to-image model trained from scratch on captioned scenes of coloured shapes."""
