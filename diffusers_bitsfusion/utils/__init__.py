"""Utilities of the whole package: files, hooks, the Hub, processes, timesteps."""
