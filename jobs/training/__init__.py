"""Training of the demo model: what it is shown (`lessons`), what it is to say (`dialogues`)."""
