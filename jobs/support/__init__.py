"""What several scripts share: answering, photographs, the machine."""
