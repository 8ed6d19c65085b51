"""For operators: gauges, and the side port with its metrics and its status page."""
