"""What a model weighs, told before and after quantizing: sizes, histograms, the model card."""
