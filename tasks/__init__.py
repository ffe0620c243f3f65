"""What is learned: schema, preparation, model, loss and metrics of clinical tasks.

Knows nothing of federation. Importing a task is cheap: torch is loaded when a model is made.
"""
