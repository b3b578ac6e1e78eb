"""Full precision beside quantized, in the browser; needs the extra `app`.

Imported on demand: `import diffusers_bitsfusion` alone loads nothing of it.
"""
