"""The stages of the soak, each run in a process of its own; `soak.py` runs them."""
