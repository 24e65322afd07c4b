"""The compiled engine: the method in C++, for one problem at a time.

`engine` solves NumPy arrays on the processor's threads; importing it is an ImportError where it was not built. `gpu`
solves the arrays on a GPU, in kernels that are compiled at first use.
"""
