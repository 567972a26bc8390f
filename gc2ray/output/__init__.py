"""The output directory: plan, parts and retries; verified and compacted."""
