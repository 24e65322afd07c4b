"""The engines: the array engine, which is the reference, and the compiled engine, which takes the same steps."""
