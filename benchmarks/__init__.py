"""What ummunotify costs: `python -m benchmarks` measures it and writes docs/benchmarks.md."""
