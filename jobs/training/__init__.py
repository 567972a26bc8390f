"""Training of the pocket model: what it is shown (`lessons`), what it is to say (`dialogues`)."""
