"""The C loops, compiled on the machine where they run or brought by the wheel, and their loader."""
