"""The published evaluations, each in a module of its own behind one interface."""
