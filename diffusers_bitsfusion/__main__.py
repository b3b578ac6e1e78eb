"""`python -m diffusers_bitsfusion`: the command line, as `accelerate launch -m` starts it."""

from .cli import app

app(prog_name="bitsfusion")
