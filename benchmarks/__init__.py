"""Programs that measure on a machine, and what they measured."""
