"""What runs at the coordinator: the round loop, checkpoints, the registry and the publisher."""
