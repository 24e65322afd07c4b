"""The engines, which take the same steps: each solves a batch of problems and keeps what its derivative needs."""
