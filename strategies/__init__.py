"""How updates become a model: arithmetic on arrays, no I/O."""
