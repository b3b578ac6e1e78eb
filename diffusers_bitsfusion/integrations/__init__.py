"""Everything that knows the insides of diffusers, transformers, accelerate or PEFT."""
