"""Where rows come from: one file per input format."""
