"""The array engine: the method in the operations of an array library, for a whole batch in lock step."""
