"""What is learned: schema, preparation, model, loss and metrics. Knows nothing of federation."""
