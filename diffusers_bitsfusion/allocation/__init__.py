"""Bits per layer, as pure functions of sizes, errors and budgets."""
