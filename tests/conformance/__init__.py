"""Tiny models of the classes of diffusers, and what is checked of each packed one."""
