"""A job on Ray: driver, workers, shards."""
