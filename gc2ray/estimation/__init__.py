"""What a run would cost, and which retention pays."""
