"""Where rows come from: which files and columns those are, and one file per input format."""
