"""What a run did: numbers, pages, terminal."""
