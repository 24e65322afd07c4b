"""The array engine: the method in the operations of an array library, for many problems in lock step.

A batch is worked on in *chunks*, consecutive problems whose arrays fit in memory together. A chunk is divided into
*sub-batches*, problems that are solved by the same reduced KKT system (`SubBatch`); those that have ended are dropped
from them. A *work item* is what one thread does of an operation on a stack of matrices (`backend.numpy`).
"""
