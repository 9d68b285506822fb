"""What is measured, against what, on what data; `python -m benchmarks` lists the figures."""
