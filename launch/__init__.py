"""How jobs start: local, Slurm, Kubernetes and ssh launches of `python -m train`, and sweeps of them."""
