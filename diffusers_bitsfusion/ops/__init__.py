"""The operators on packed weights, and the one place that decides by which kernel each is computed."""
