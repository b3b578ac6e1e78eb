"""A run of both stages on a Stable Diffusion pipeline, as `bitsfusion train` and the training script start it."""
