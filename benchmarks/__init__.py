"""Side-by-side measurements; results with machine and date under benchmarks/results/."""
