"""What every room may use: files, hooks, the Hub, processes, timesteps."""
