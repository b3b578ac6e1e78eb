"""Code that depends on the internals of diffusers, transformers, accelerate or PEFT."""
