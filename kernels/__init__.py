"""Fast implementations of the structural ops, each beside its reference."""
