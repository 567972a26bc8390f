"""What a YAML may say: the recipe and its parts, the cluster, the job."""
