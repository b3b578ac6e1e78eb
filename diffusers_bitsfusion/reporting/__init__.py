"""The size of a model, before and after quantizing: bytes and bits, histograms, the model card."""
