"""What several benchmarks share: inputs, peers, timing, a simulated cluster."""
