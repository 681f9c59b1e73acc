"""What `scripts/bench_quality.py` is made of: tasks, methods, one run, all runs, and what is said of them."""
