"""The Python interface: `robsparse.load`, `robsparse.evaluate` and `robsparse.read_results`.

`import robsparse` offers these functions, and loads them (and torch) at their first use.
"""
