"""Two-stage training of models in the precision that they are packed in (paper, section 6)."""
